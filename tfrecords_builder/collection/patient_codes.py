"""Patients of DICOM files, as codes: a keyed hash of the Patient ID, which is stored nowhere in clear.

A hash without a key hides nothing, as all numbers of a hospital are soon tried. The key is random, is made once for
each user, and lies outside of all datasets, so that who gets a dataset cannot try. With one key the same patient has
the same code in every dataset, and copies between collections can be found. The code names its key: codes of two keys
are never equal, and tell that they cannot be compared.
"""

import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from tfrecords_builder.collection.metadata import normalized_patient
from tfrecords_builder.common.errors import UserError

KEY_VARIABLE = "CXR_DIST_PATIENT_KEY"
"""Environment variable with the path of the key's file, in place of the user's own."""
_PREFIX = "dicom"
_CODE = re.compile(rf"{_PREFIX}-([0-9a-f]{{8}})-[0-9a-f]{{32}}")
_LEAST_BYTES = 16
_NO_PATIENT = frozenset({"anon", "anonymised", "anonymized", "anonymous"})


@dataclass(frozen=True, slots=True)
class PatientKey:
    """The key of codes."""

    secret: bytes = field(repr=False)

    @property
    def name(self) -> str:
        """Eight hexadecimal digits that tell keys apart, and nothing of them."""
        return self._digest("key")[:8]

    def code(self, patient_id: str) -> str | None:
        """The code of a Patient ID, in whatever spelling `normalized_patient` makes equal; None for nobody's."""
        patient = normalized_patient(patient_id)
        if patient is None or patient in _NO_PATIENT:
            return None
        return f"{_PREFIX}-{self.name}-{self._digest(f'patient {patient}')[:32]}"

    def _digest(self, text: str) -> str:
        return hmac.new(self.secret, text.encode(errors="backslashreplace"), hashlib.sha256).hexdigest()


def patient_key() -> PatientKey:
    """The key in the file that $CXR_DIST_PATIENT_KEY names, else in the user's own, which is made when first needed.

    Raises:
        UserError: The file cannot be read or made, or is no key.
    """
    named = os.environ.get(KEY_VARIABLE)
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    path = Path(named) if named else config / "cxr-dist" / "patient-key"
    try:
        if not named and not path.exists():
            _make(path)
        secret = path.read_bytes().strip()
    except OSError as error:
        advice = f"; give a file of {_LEAST_BYTES} random bytes or more as ${KEY_VARIABLE}"
        raise UserError(f"{path}: the key for patients cannot be read or made ({error.strerror}){advice}") from error
    if len(secret) < _LEAST_BYTES:
        raise UserError(f"{path}: a key for patients has {_LEAST_BYTES} bytes or more; restore it, or remove the file")
    return PatientKey(secret)


def key_of(patient: str) -> str | None:
    """The name of the key of a patient's code; None for a patient in clear."""
    found = _CODE.fullmatch(patient)
    return found[1] if found else None


def names_of(patient: str | None, key: PatientKey | None) -> frozenset[str]:
    """Every name under which a patient may be in another collection.

    Args:
        patient: As `normalized_patient` writes it, or a code; None where it is unknown.
        key: Of the codes to compare with, where there are any.

    Returns:
        The patient as it is, and of one in clear the code too.
    """
    if patient is None:
        return frozenset()
    code = None if key is None or key_of(patient) else key.code(patient)
    return frozenset({patient} if code is None else {patient, code})


def with_key(digest: str | None, key: PatientKey | None) -> str | None:
    """The SHA-256 of metadata, with the name of the key that further patients are coded by."""
    return digest if key is None else hashlib.sha256(f"{digest}\0{key.name}".encode()).hexdigest()


def _make(path: Path) -> None:
    """Whole or not at all, and by one process alone: the others find what it made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{secrets.token_hex(32)}\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(written, path)
        except FileExistsError:
            return
    finally:
        written.unlink(missing_ok=True)
