"""Encryption of exported files to the people who may read them, in the age format (age-encryption.org/v1).

Knows files and recipients; neither who asked nor what the files hold.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyrage

from tinsmith.errors import UserError

SUFFIX = ".age"
MOST_RECIPIENTS = 10

_SHOWN = 14  # characters of a malformed recipient: by mistake, it may be a secret key


def read_recipients(texts: Sequence[str]) -> list[Any]:
    """`age1…` keys and SSH public keys. Raises UserError for anything else, and for more than MOST_RECIPIENTS."""
    if len(texts) > MOST_RECIPIENTS:
        raise UserError(f"{len(texts)} age_encryption_recipients are too many; at most {MOST_RECIPIENTS} are taken")
    return [_read(number, text.strip()) for number, text in enumerate(texts)]


def _read(number: int, text: str) -> Any:
    kind = pyrage.ssh if text.startswith("ssh-") else pyrage.x25519
    try:
        return kind.Recipient.from_str(text)
    except pyrage.RecipientError as error:
        raise UserError(
            f"age_encryption_recipients[{number}] ({text[:_SHOWN]}…) is no recipient: {error}; give age1… keys, as "
            "age-keygen prints them, or SSH public keys (ssh-ed25519 …, ssh-rsa …)"
        ) from error


def encrypt_folder(folder: Path, recipients: Sequence[Any]) -> None:
    """Replaces every file of a folder by one that only the recipients can read, with SUFFIX behind its name."""
    for plain in sorted(folder.iterdir()):
        pyrage.encrypt_file(str(plain), str(plain) + SUFFIX, recipients)
        plain.unlink()


def is_encrypted(folder: Path) -> bool:
    """Whether a folder's files are only for their recipients, so that not even the server can read them."""
    return any(folder.glob(f"*{SUFFIX}"))
