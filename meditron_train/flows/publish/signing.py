"""Signatures of whole directories by the OpenSSF library `model-signing`, with an elliptic-curve key."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from meditron_train.checkpoint.manifest import SIGNATURE_NAME
from meditron_train.errors import MeditronError, UserError
from meditron_train.files import read_whole

_MAX_KEY_BYTES = 1 << 20


def require_library() -> None:
    """The library must be there.

    Raises:
        UserError: it is not, and what to install.
    """
    try:
        import model_signing  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--sign needs model-signing ({error}): pip install 'meditron-train[publish]'"
        ) from None


def read_key(path: Path) -> Any:
    """The private key in a PEM file.

    Raises:
        UserError: it is not one that can sign: ECDSA on a NIST curve, without a password.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    advice = "write one with: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
    try:
        key = load_pem_private_key(read_whole(path, _MAX_KEY_BYTES), password=None)
    except OSError as error:
        raise UserError(f"--sign {path} cannot be read: {error.strerror or error}") from None
    except TypeError:
        raise UserError(
            f"--sign {path} has a password: give a key without one (openssl ec removes it)"
        ) from None
    except ValueError as error:
        raise UserError(f"--sign {path} is not a private key in PEM ({error}); {advice}") from None
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise UserError(f"--sign {path} is not an ECDSA key on one of {', '.join(_CURVES)}; {advice}")
    return key


_CURVES = ("secp256r1", "secp384r1", "secp521r1")


def public_pem(key: Any) -> bytes:
    """Of a private key."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def fingerprint(key: Any) -> str:
    """SHA-256 of the public key (SubjectPublicKeyInfo, DER), as `openssl pkey -pubin -outform DER` writes it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def sign(directory: Path, key_path: Path, key: Any) -> None:
    """Sign all files of the directory into `model.sig` in it, and have the library verify that with the public key.

    Raises:
        MeditronError: it could not be signed or verified.
    """
    from model_signing import hashing, signing, verifying

    signature = directory / SIGNATURE_NAME
    try:
        hashes = hashing.Config().set_ignored_paths(paths=[SIGNATURE_NAME])
        signer = signing.Config().use_elliptic_key_signer(private_key=key_path).set_hashing_config(hashes)
        signer.sign(directory, signature)
        with tempfile.NamedTemporaryFile(suffix=".pem") as public:
            public.write(public_pem(key))
            public.flush()
            verifying.Config().use_elliptic_key_verifier(public_key=public.name).verify(directory, signature)
    except (ValueError, OSError) as error:
        raise MeditronError(f"{directory} could not be signed with {key_path}: {error}") from error
