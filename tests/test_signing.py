"""A signature says who has signed an adapter, and that it is what was signed."""

import base64
import json
import shutil
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from model_signing import signing, verifying

from safeweights_peft.errors import CorruptAdapterError, FormatError, SignatureError
from safeweights_peft.patch.io import read_adapter, validate
from safeweights_peft.signing import sign, verify_signature
from tests.merging.cases import Case, plain_layout
from tests.tiny_files import edit_config, edit_tensors


class Keys:
    """A pair of keys as PEM files.

    Attributes:
        private: the private key's file.
        public: the public key's.
    """

    def __init__(self, folder: Path, name: str = "key", curve: type = ec.SECP256R1) -> None:
        key = ec.generate_private_key(curve())
        self.private, self.public = folder / f"{name}.pem", folder / f"{name}.pub"
        self.private.write_bytes(private_pem(key))
        form = PublicFormat.SubjectPublicKeyInfo
        self.public.write_bytes(key.public_key().public_bytes(Encoding.PEM, form))


def private_pem(key: object, password: bytes | None = None) -> bytes:
    protection = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    return Case(tmp_path, plain_layout("bfloat16")).patch


@pytest.fixture
def signed(patch: Path, keys: Keys) -> Path:
    sign(patch, keys.private)
    return patch


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_what_was_signed_is_recognised(curve: type, patch: Path, tmp_path: Path) -> None:
    keys = Keys(tmp_path, curve=curve)
    made = sign(patch, keys.private)
    assert verify_signature(patch, keys.public) == made
    assert made["content_id"] == validate(patch).content_id
    assert made["files"] == ["adapter_config.json", "adapter_model.safetensors"]


def test_signing_leaves_the_adapter_as_it_is(patch: Path, keys: Keys) -> None:
    before = {path.name: path.read_bytes() for path in patch.iterdir()}
    sign(patch, keys.private)
    after = {path.name: path.read_bytes() for path in patch.iterdir()}
    assert after.keys() - before.keys() == {"model.sig"}
    assert before.items() <= after.items()


def test_a_reader_ignores_the_signature(signed: Path) -> None:
    assert read_adapter(signed).deltas


def test_cards_results_and_pictures_may_be_added_and_changed(signed: Path, keys: Keys) -> None:
    before = verify_signature(signed, keys.public)
    for name in ("README.md", "results/after.json", "images/map.png", "map/adapter_config.json"):
        (signed / name).parent.mkdir(exist_ok=True)
        (signed / name).write_text("new")
    assert verify_signature(signed, keys.public) == before


def test_the_folder_may_be_renamed_and_its_files_be_links(
    signed: Path, keys: Keys, tmp_path: Path
) -> None:
    """As in the Hub's cache."""
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for path in signed.iterdir():
        (snapshot / path.name).symlink_to(path)
    found = verify_signature(snapshot, keys.public)
    assert found["signature"] == str(snapshot / "model.sig")
    assert found["content_id"] == validate(signed).content_id


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_changed_is_named(name: str, signed: Path, keys: Keys) -> None:
    with (signed / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(SignatureError, match=rf"found {name} other than what was signed"):
        verify_signature(signed, keys.public)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_gone_is_named(name: str, signed: Path, keys: Keys) -> None:
    (signed / name).unlink()
    with pytest.raises(SignatureError, match=name):
        verify_signature(signed, keys.public)


def test_the_signature_of_another_adapter_is_refused(
    signed: Path, keys: Keys, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(signed, tmp_path / "other"))
    (other / "model.sig").unlink()
    edit_config(other, lambda config: config.update(scale=0.5))
    sign(other, keys.private)
    shutil.copy(other / "model.sig", signed / "model.sig")
    with pytest.raises(SignatureError, match="other than what was signed"):
        verify_signature(signed, keys.public)


def test_a_signature_over_other_files_vouches_for_none_of_these(
    patch: Path, keys: Keys, tmp_path: Path
) -> None:
    """The signer has signed some model; its files and its signature are put beside an adapter."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    config = signing.Config().use_elliptic_key_signer(private_key=keys.private)
    config.sign(model, tmp_path / "model.sig")
    for path in (model / "config.json", tmp_path / "model.sig"):
        shutil.copy(path, patch)
    with pytest.raises(SignatureError, match=r"adapter_config\.json and adapter_model"):
        verify_signature(patch, keys.public)


def test_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match="Key mismatch"):
        verify_signature(signed, Keys(tmp_path, "other").public)


def test_a_signature_that_claims_the_key_of_another_is_refused(
    signed: Path, keys: Keys, tmp_path: Path
) -> None:
    claimed = json.loads((signed / "model.sig").read_text())["verificationMaterial"]
    sign(signed, Keys(tmp_path, "other").private, overwrite=True)
    bundle = json.loads((signed / "model.sig").read_text())
    (signed / "model.sig").write_text(json.dumps(bundle | {"verificationMaterial": claimed}))
    with pytest.raises(SignatureError, match="InvalidSignature"):
        verify_signature(signed, keys.public)


def test_a_changed_statement_is_refused(signed: Path, keys: Keys) -> None:
    bundle = json.loads((signed / "model.sig").read_text())
    envelope = bundle["dsseEnvelope"]
    statement = base64.b64decode(envelope["payload"]).replace(b"sha256", b"sha255")
    envelope["payload"] = base64.b64encode(statement).decode()
    (signed / "model.sig").write_text(json.dumps(bundle))
    with pytest.raises(SignatureError, match="InvalidSignature"):
        verify_signature(signed, keys.public)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"verificationMaterial": 1}'])
def test_a_file_that_is_no_signature_is_an_error_of_one_line(
    content: bytes, signed: Path, keys: Keys
) -> None:
    (signed / "model.sig").write_bytes(content)
    with pytest.raises(SignatureError, match=r"model\.sig: expected the signature") as caught:
        verify_signature(signed, keys.public)
    assert "\n" not in str(caught.value)


def test_a_signature_without_the_keys_name_prints_nothing(
    signed: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = json.loads((signed / "model.sig").read_text())
    del bundle["verificationMaterial"]["publicKey"]["hint"]
    (signed / "model.sig").write_text(json.dumps(bundle))
    verify_signature(signed, keys.public)
    assert capsys.readouterr().out == ""


def test_a_missing_signature_is_told(patch: Path, keys: Keys) -> None:
    with pytest.raises(SignatureError, match="expected a signature, found none"):
        verify_signature(patch, keys.public)


@pytest.mark.parametrize("kind", ["rsa", "ed25519", "encrypted", "curve", "public", "text", "none"])
def test_a_key_that_cannot_sign_is_refused(
    kind: str, patch: Path, keys: Keys, tmp_path: Path
) -> None:
    file = tmp_path / "bad.pem"
    made = {
        "rsa": lambda: private_pem(rsa.generate_private_key(65537, 2048)),
        "ed25519": lambda: private_pem(ed25519.Ed25519PrivateKey.generate()),
        "encrypted": lambda: private_pem(ec.generate_private_key(ec.SECP256R1()), b"secret"),
        "curve": lambda: private_pem(ec.generate_private_key(ec.SECP256K1())),
        "public": keys.public.read_bytes,
        "text": lambda: b"my key",
    }
    if kind in made:
        file.write_bytes(made[kind]())
    with pytest.raises(SignatureError, match=r"bad\.pem: expected an elliptic-curve key"):
        sign(patch, file)
    assert not (patch / "model.sig").exists()


def test_a_key_that_cannot_verify_is_refused(signed: Path, keys: Keys) -> None:
    with pytest.raises(SignatureError, match="the public one, found another file"):
        verify_signature(signed, keys.private)


def test_a_broken_adapter_is_not_signed(patch: Path, keys: Keys) -> None:
    edit_tensors(patch, lambda tensors: tensors.popitem())
    with pytest.raises(CorruptAdapterError):
        sign(patch, keys.private)
    with pytest.raises(FormatError):
        sign(patch.parent / "base", keys.private)
    assert not (patch / "model.sig").exists()


def test_a_broken_adapter_that_was_signed_elsewhere_is_refused(patch: Path, keys: Keys) -> None:
    edit_config(patch, lambda config: config["tensors"].popitem())
    config = signing.Config().use_elliptic_key_signer(private_key=keys.private)
    config.sign(patch, patch / "model.sig")
    with pytest.raises(CorruptAdapterError):
        verify_signature(patch, keys.public)


def test_a_signature_is_not_written_over(signed: Path, keys: Keys) -> None:
    before = (signed / "model.sig").read_bytes()
    with pytest.raises(SignatureError, match="expected no signature yet"):
        sign(signed, keys.private)
    assert (signed / "model.sig").read_bytes() == before
    assert sorted(path.suffix for path in signed.iterdir()) == [".json", ".safetensors", ".sig"]


def test_model_signings_own_way_agrees(signed: Path, keys: Keys) -> None:
    config = verifying.Config().use_elliptic_key_verifier(public_key=keys.public)
    config.verify(signed, signed / "model.sig")
    (signed / "README.md").write_text("new")
    config = verifying.Config().use_elliptic_key_verifier(public_key=keys.public)
    config.set_ignore_unsigned_files(True).verify(signed, signed / "model.sig")
    with (signed / "adapter_config.json").open("ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match="adapter_config"):
        config.verify(signed, signed / "model.sig")


def test_without_the_library_it_is_told_how_to_get_it(
    patch: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(SignatureError, match=r"pip install safeweights-peft\[sign\]"):
        sign(patch, keys.private)
