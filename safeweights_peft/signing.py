"""Sign safety patches and maps with a key of one's own, by OpenSSF model-signing.

Source: https://github.com/sigstore/model-transparency
"""

import secrets
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from safeweights_peft.errors import SignatureError
from safeweights_peft.files import PathLike, sync
from safeweights_peft.patch.io import ADAPTER_FILES, read_artifact

SIGNATURE_FILE = "model.sig"
"""The name that model-signing's own command line gives a signature."""


def sign(
    adapter_dir: PathLike,
    private_key: PathLike,
    out: PathLike | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Sign an adapter, which is checked first and stays as it is.

    Args:
        adapter_dir: A safety patch or a safety map.
        private_key: The signer's private key, a PEM file.
        out: The signature's file; ``model.sig`` in the adapter's directory if None.
        overwrite: Replace an existing signature.

    Returns:
        Plain JSON: the signature's path, the names of the signed files, and the adapter's content
        id.

    Raises:
        SignatureError: There is a signature, the key can't be used, or a package is missing.

    Example:
        >>> from safeweights_peft import sign
        >>> sign("demo/run/patch", "demo/key.pem")["files"]
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    folder = Path(adapter_dir)
    target = folder / SIGNATURE_FILE if out is None else Path(out)
    if target.exists() and not overwrite:
        raise SignatureError(
            f"{target}: expected no signature yet, found a file; give --overwrite to replace it"
        )
    content_id = read_artifact(folder).metadata.content_id
    config = _import().signing.Config()
    hint = "make one with `openssl ecparam -name prime256v1 -genkey -noout -out FILE`"
    _use_key(lambda key: config.use_elliptic_key_signer(private_key=key), private_key, "", hint)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        config.set_hashing_config(_hashing(folder)).sign(folder, draft)
        sync(draft)
        draft.replace(target)
    except ValueError as reason:
        raise SignatureError(f"{folder}: expected files to sign, found: {reason}") from reason
    finally:
        draft.unlink(missing_ok=True)
    return {"signature": str(target), "files": list(ADAPTER_FILES), "content_id": content_id}


def verify_signature(
    adapter_dir: PathLike, public_key: PathLike, signature: PathLike | None = None
) -> dict[str, Any]:
    """Check that an adapter is intact, and signed by the owner of a key.

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
    folder = Path(adapter_dir)
    source = folder / SIGNATURE_FILE if signature is None else Path(signature)
    if not source.is_file():
        raise SignatureError(
            f"{source}: expected a signature, found none; the adapter is not signed, or the "
            "signature is elsewhere"
        )
    config = _import().verifying.Config()
    use = config.use_elliptic_key_verifier
    _use_key(
        lambda key: use(public_key=key), public_key, ", the public one", "ask the signer for it"
    )
    try:
        with redirect_stdout(None):  # the library prints a warning about old signatures
            config.set_hashing_config(_hashing(folder)).verify(folder, source)
    except Exception as reason:  # a hostile file makes the library's parsers fail in any way
        raise SignatureError(
            f"{source}: expected the signature of this adapter by the owner of {public_key}, "
            f"found {_explain(reason)}; do not use this adapter"
        ) from reason
    content_id = read_artifact(folder).metadata.content_id
    return {"signature": str(source), "files": list(ADAPTER_FILES), "content_id": content_id}


def _use_key(use: Callable[[Path], object], key: PathLike, kind: str, hint: str) -> None:
    try:
        use(Path(key))
    # What the library and cryptography raise of no file, no PEM, a password, another kind of key.
    except (OSError, ValueError, TypeError, AttributeError) as reason:
        raise SignatureError(
            f"{key}: expected an elliptic-curve key (P-256, P-384 or P-521), unencrypted, in PEM "
            f"form{kind}, found another file ({reason}); {hint}"
        ) from reason


def _import() -> Any:
    # An optional dependency, so imported where it is used.
    try:
        import model_signing
    except ModuleNotFoundError as reason:
        raise SignatureError(
            f"model-signing: expected to be installed, found no {reason.name}; run "
            "`pip install safeweights-peft[sign]`"
        ) from reason
    return model_signing


def _hashing(folder: Path) -> Any:
    # The adapter's own files are signed alone, so that cards and results may be added later; they
    # are links in the Hub's cache.
    others = {SIGNATURE_FILE, *(path.name for path in folder.iterdir())} - {*ADAPTER_FILES}
    config = _import().hashing.Config()
    config.set_ignored_paths(paths=sorted(others), ignore_git_paths=False)
    return config.set_allow_symlinks(True)


def _explain(reason: Exception) -> str:
    """Say in one line why the library refuses a signature."""
    text = " ".join(str(reason).split())
    # Of a mismatch the library shows hashes as bytes; the names of the files say more.
    changed = [name for name in ADAPTER_FILES if name in text]
    if changed:
        return f"{' and '.join(changed)} other than what was signed"
    return f"{type(reason).__name__} ({text[:200]})" if text else type(reason).__name__
