"""What a run would take on a slice of TPUs, by compiling it ahead of time, without one."""
