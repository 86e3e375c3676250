"""Counts what is read out of safetensors files, without changing what comes back."""

import safetensors

_open = safetensors.safe_open


class Counting:
    """`safe_open`, keeping in `read` the size of every slice taken, by the tensor's name."""

    read: dict[str, list[int]]

    def __init__(self, *args, **kwargs):
        self._file = _open(*args, **kwargs)

    def __enter__(self):
        self._opened = self._file.__enter__()
        self.keys = self._opened.keys
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def get_slice(self, name):
        view, sizes = self._opened.get_slice(name), self.read.setdefault(name, [])

        class Slice:
            get_shape, get_dtype = view.get_shape, view.get_dtype

            def __getitem__(self, index):
                value = view[index]
                sizes.append(value.size)
                return value

        return Slice()


def counting():
    """A new `safe_open` that counts from nothing."""
    return type("Counting", (Counting,), {"read": {}})
