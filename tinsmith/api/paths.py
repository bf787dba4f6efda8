"""The grammar of checkpoint paths: `tinker://{model id}/{weights|sampler_weights|external_weights}/{name}`."""

from dataclasses import dataclass

from tinsmith.errors import UserError

SCHEME = "tinker://"
KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
SEGMENTS = {kind: segment for segment, kind in KINDS.items()}
MAX_NAME_BYTES = 200  # names become names of files


@dataclass(frozen=True, slots=True)
class CheckpointPath:
    """The parts of a path; `kind` is training, sampler or external."""

    model_id: str
    kind: str
    name: str

    @property
    def checkpoint_id(self) -> str:
        return f"{SEGMENTS[self.kind]}/{self.name}"

    def __str__(self) -> str:
        return f"{SCHEME}{self.model_id}/{self.checkpoint_id}"


def parse_path(text: str) -> CheckpointPath:
    """Raises UserError if `text` is no checkpoint path."""
    parts = text.removeprefix(SCHEME).split("/")
    if not text.startswith(SCHEME) or len(parts) != 3 or parts[1] not in KINDS or not all(parts):
        raise UserError(f"{text!r} is no checkpoint path; it must be {SCHEME}MODEL_ID/({'|'.join(KINDS)})/NAME")
    model_id, segment, name = parts
    return CheckpointPath(model_id, KINDS[segment], name)


def check_name(name: str) -> str:
    """The name itself, if a checkpoint may be called so. Raises UserError."""
    fits = 0 < len(name.encode(errors="replace")) <= MAX_NAME_BYTES
    if not fits or not name.isprintable() or name.strip() != name or "/" in name or "\\" in name or ".." in name:
        raise UserError(
            f"checkpoint name {name[:80]!r} is not allowed; it must have 1 to {MAX_NAME_BYTES} bytes of printable "
            "characters, no '/', '\\' or '..', and no space at its ends"
        )
    return name
