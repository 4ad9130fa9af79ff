"""Signatures of safety patches and maps by a key of one's own, with OpenSSF model-signing.

Here live which files are signed, and errors that say what to do. The signature's own format, a
Sigstore bundle, and the cryptography are the library's, which is an optional dependency: it is
imported when it is used. Who owns a key is for its owner to make known.
Source: https://github.com/sigstore/model-transparency
"""

import os
import secrets
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from safeweights_peft.errors import SignatureError
from safeweights_peft.files import sync
from safeweights_peft.patch.io import ADAPTER_FILES, read_artifact

PathLike = str | os.PathLike[str]

SIGNATURE_FILE = "model.sig"
"""The name that model-signing's own command line gives a signature."""

_KEY = "an elliptic-curve key (P-256, P-384 or P-521), unencrypted, in PEM form"


def sign(
    adapter_dir: PathLike,
    private_key: PathLike,
    out: PathLike | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Sign an adapter; it is checked first, and stays as it is.

    Args:
        adapter_dir: A safety patch or a safety map.
        private_key: The signer's private key, a PEM file.
        out: The signature's file; ``model.sig`` in the adapter's directory if None.
        overwrite: Replace an existing signature.

    Returns:
        Plain JSON: the signature's path, what is signed, and the adapter's content id.

    Raises:
        SignatureError: There is a signature, the key can't be used, or a package is missing.

    Example:
        >>> from safeweights_peft import sign
        >>> sign("demo/run/patch", "demo/key.pem")["files"]
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    folder, target = Path(adapter_dir), _signature(adapter_dir, out)
    if target.exists() and not overwrite:
        raise SignatureError(
            f"{target}: expected no signature yet, found a file; set overwrite to replace it"
        )
    content_id = read_artifact(folder).metadata.content_id
    signing = _import().signing
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=Path(private_key))
    except (OSError, ValueError, TypeError, AttributeError) as reason:  # of another kind; encrypted
        raise SignatureError(
            f"{private_key}: expected {_KEY}, found another file ({reason}); make one with "
            "`openssl ecparam -name prime256v1 -genkey -noout -out FILE`"
        ) from reason
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        config.set_hashing_config(_hashing(folder)).sign(folder, draft)
        sync(draft)
        draft.replace(target)
    except ValueError as reason:
        raise SignatureError(f"{folder}: expected files to sign, found: {reason}") from reason
    finally:
        draft.unlink(missing_ok=True)
    return _record(target, content_id)


def verify_signature(
    adapter_dir: PathLike, public_key: PathLike, signature: PathLike | None = None
) -> dict[str, Any]:
    """Check that an adapter is intact, and as the owner of a key has signed it.

    Args:
        adapter_dir: A safety patch or a safety map.
        public_key: The signer's public key, a PEM file that comes from the signer, not with the
            adapter.
        signature: The signature's file; ``model.sig`` in the adapter's directory if None.

    Returns:
        Plain JSON, as :func:`sign` returns it.

    Raises:
        SignatureError: There is no signature, it is by another key or over other files, the key
            can't be used, or a package is missing.

    Example:
        >>> from safeweights_peft import sign, verify_signature
        >>> signed = sign("demo/run/patch", "demo/key.pem")
        >>> verify_signature("demo/run/patch", "demo/key.pub") == signed
        True
    """
    folder, source = Path(adapter_dir), _signature(adapter_dir, signature)
    if not source.is_file():
        raise SignatureError(
            f"{source}: expected a signature, found none; the adapter is not signed, or the "
            "signature is elsewhere"
        )
    verifying = _import().verifying
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=Path(public_key))
    except (OSError, ValueError, TypeError, AttributeError) as reason:
        raise SignatureError(
            f"{public_key}: expected {_KEY}, the public one, found another file ({reason}); ask "
            "the signer for it"
        ) from reason
    try:
        with redirect_stdout(None):  # the library prints a warning about old signatures
            config.set_hashing_config(_hashing(folder)).verify(folder, source)
    except Exception as reason:  # a hostile file makes the library's parsers fail in any way
        raise SignatureError(
            f"{source}: expected the signature of this adapter by the owner of {public_key}, "
            f"found {_told(reason)}; do not use this adapter"
        ) from reason
    return _record(source, read_artifact(folder).metadata.content_id)


def _signature(adapter_dir: PathLike, given: PathLike | None) -> Path:
    return Path(adapter_dir) / SIGNATURE_FILE if given is None else Path(given)


def _record(signature: Path, content_id: str | None) -> dict[str, Any]:
    return {
        "signature": str(signature),
        "files": list(ADAPTER_FILES),
        "content_id": content_id,
    }


def _import() -> Any:
    try:
        import model_signing
    except ModuleNotFoundError as reason:
        raise SignatureError(
            f"model-signing: expected to be installed, found no {reason.name}; run "
            "`pip install safeweights-peft[sign]`"
        ) from reason
    return model_signing


def _hashing(folder: Path) -> Any:
    """Hash the adapter's own files alone, also where they are links, as in the Hub's cache."""
    hashing = _import().hashing
    others = {SIGNATURE_FILE, *(path.name for path in folder.iterdir())} - {*ADAPTER_FILES}
    config = hashing.Config().set_ignored_paths(paths=sorted(others), ignore_git_paths=False)
    return config.set_allow_symlinks(True)


def _told(reason: Exception) -> str:
    """Tell the library's reason in a line; of a mismatch, which it tells in bytes, the names."""
    text = " ".join(str(reason).split())
    changed = [name for name in ADAPTER_FILES if name in text]
    if changed:
        return f"{' and '.join(changed)} other than what was signed"
    return f"{type(reason).__name__} ({text[:200]})" if text else type(reason).__name__
