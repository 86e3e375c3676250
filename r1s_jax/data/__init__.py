"""Where questions come in: JSONL files, the bundled world, and the order they are asked in."""
