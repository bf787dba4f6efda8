"""Errors after which a GPU does nothing more for this process, told from those that concern one request.

Such an error returns from every later call on the device, whoever makes it, so the engine must end and be started
again. Knows what libraries write into their errors, and not the libraries.
"""

from collections.abc import Iterator

_FATAL = (
    "device-side assert",
    "illegal memory access",
    "illegal instruction",
    "illegal address",
    "misaligned address",
    "invalid program counter",
    "address space",
    "hardware stack error",
    "unspecified launch failure",
    "launch timed out",
    "uncorrectable",  # ECC and NVLink errors
    "context is destroyed",
    "driver shutting down",
    "device is lost",
    "gpu is lost",
    "status_execution_failed",  # of cuBLAS and cuDNN
)
_HARMLESS = (
    "out of memory",
    "invalid argument",
    "invalid configuration",
    "too many resources requested",
    "no kernel image",
    "not supported",
    "captur",  # of a graph: only the capture is lost
)
_LIBRARIES = ("cuda", "hip error", "cudnn", "cublas", "triton")


class DeviceLostError(BaseException):
    """The device is lost to this process. No `except Exception` holds it up: the process ends, and another begins."""


def raise_if_lost(error: BaseException) -> None:
    """Raises DeviceLostError if `error`, or what led to it, says that the device is lost; otherwise returns."""
    for link in _chain(error):
        if is_lost(link):
            raise DeviceLostError(f"the device is lost to this process ({type(link).__name__}: {link})") from error


def is_lost(error: BaseException) -> bool:
    """Whether this error, by its words, stays with the process.

    One that torch raises for the device itself does, unless it is known to be harmless; of others, those with the
    words of a device library for a fault in a kernel, or of the hardware.
    """
    words = str(error).lower()
    if type(error).__name__ == "AcceleratorError":
        return any(word in words for word in _FATAL) or not any(word in words for word in _HARMLESS)
    return any(word in words for word in _FATAL) and any(library in words for library in _LIBRARIES)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
