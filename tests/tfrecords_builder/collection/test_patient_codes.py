"""Codes of patients: equal for equal patients and keys, and no way back without the key."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tfrecords_builder.collection.patient_codes import KEY_VARIABLE, PatientKey, patient_key
from tfrecords_builder.common.errors import UserError

KEY = PatientKey(b"k" * 32)


def test_codes_follow_patient_and_key() -> None:
    code = KEY.code("PAT-1")
    assert code is not None
    assert code == KEY.code(" pat-1 ")
    assert code.startswith(f"dicom-{KEY.name}-")
    assert code not in (KEY.code("PAT-2"), PatientKey(b"l" * 32).code("PAT-1"))
    assert "pat" not in code.lower().removeprefix("dicom")
    for nobody in ("", "  ", "unknown", "ANONYMOUS", "N/A"):
        assert KEY.code(nobody) is None
    assert "k" * 8 not in repr(KEY)


def test_the_users_own_key_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    with ThreadPoolExecutor(8) as threads:
        keys = {key.secret for key in threads.map(lambda _: patient_key(), range(16))}
    assert len(keys) == 1
    [file] = (tmp_path / "config/cxr-dist").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(file.read_text().strip()) == 64
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
    assert patient_key().secret not in keys


def test_a_key_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    monkeypatch.setenv(KEY_VARIABLE, str(file))
    with pytest.raises(UserError, match=r"cannot be read or made \(No such file.*\); give a file"):
        patient_key()
    file.write_text("short\n")
    with pytest.raises(UserError, match="16 bytes or more"):
        patient_key()
    file.write_text("long enough to be a key\n")
    assert patient_key() == PatientKey(b"long enough to be a key")
