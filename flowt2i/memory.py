"""Running out of memory, as the allocators of every device say it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up: CUDA's, Apple's, or the CPU's, oneDNN's and cuDNN's, which raise plain RuntimeErrors."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("out of memory", "not enough memory", "t allocate memory", "cannot allocate", "bad_alloc", "alloc_failed")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def told(error: BaseException) -> str:
    """The first line of what an allocator said."""
    return str(error).splitlines()[0][:200] if str(error) else "main memory"
