"""The fleet's secret and certificates as files: where they come from, and which are refused by name."""

import pytest

from core.config import load_config, parse_config
from core.errors import ConfigurationError
from core.security import UNGUARDED, Security, TlsConfig


@pytest.fixture
def secret_file(tmp_path):
    file = tmp_path / "secret"
    file.write_text("of the file\n")
    file.chmod(0o600)
    return file


def loaded(tmp_path, **cluster):
    file = tmp_path / "config.yaml"
    file.write_text(f"cluster: {cluster}\n")
    return load_config(file).cluster


def test_the_secret_is_the_fields_then_the_files_then_the_environments(tmp_path, secret_file, monkeypatch):
    monkeypatch.setenv("BATON_CLUSTER_SECRET", "of the environment")
    assert loaded(tmp_path, secret="own", secret_file=str(secret_file)).secret == "own"
    assert loaded(tmp_path, secret_file=str(secret_file)).secret == "of the file"
    assert loaded(tmp_path).secret == "of the environment"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_secret_that_others_get_at_is_refused(tmp_path, secret_file, mode):
    secret_file.chmod(mode)
    with pytest.raises(ConfigurationError, match=rf"cluster\.secret_file .* has mode {mode:04o}") as caught:
        loaded(tmp_path, secret_file=str(secret_file))
    assert caught.value.field == "cluster.secret_file"
    assert "of the file" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\n", b"two\nlines", "schlüssel".encode()])
def test_a_file_without_a_usable_secret_is_refused(tmp_path, secret_file, content):
    secret_file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"cluster\.secret_file .* holds"):
        loaded(tmp_path, secret_file=str(secret_file))


def test_a_secret_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"cluster\.secret_file .*gone cannot be read: No such file"):
        loaded(tmp_path, secret_file=str(tmp_path / "gone"))


def test_secrets_are_not_shown():
    config = parse_config({"cluster": {"secret": "hush"}, "ingress": {"api_key": "hush"}})
    assert "hush" not in f"{config!r} {config.cluster.security!r}"


@pytest.mark.parametrize(("host", "needs"), [
    ("127.0.0.1", False), ("127.8.0.1", False), ("::1", False), ("[::1]", False), ("localhost", False),
    ("0.0.0.0", True), ("::", True), ("10.0.0.1", True), ("node-7", True),
])  # fmt: skip
def test_a_secret_is_needed_beyond_loopback(host, needs):
    Security("s").check(host)
    if not needs:
        UNGUARDED.check(host)
        return
    with pytest.raises(ConfigurationError, match=r"cluster\.secret is empty"):
        UNGUARDED.check(host)


def test_tls_takes_three_files_or_none():
    assert not parse_config({}).cluster.tls.is_on
    with pytest.raises(ConfigurationError, match=r"cluster\.tls: .*certificate_file missing"):
        parse_config({"cluster": {"tls": {"ca_file": "a", "key_file": "b"}}})


@pytest.mark.parametrize("bad", ["ca_file", "certificate_file", "key_file"])
def test_a_file_of_tls_that_cannot_be_read_is_named(tmp_path, bad):
    files = {name: tmp_path / name for name in ("ca_file", "certificate_file", "key_file")}
    for file in files.values():
        file.write_text("PEM")
        file.chmod(0o600)
    tls = TlsConfig(**{name: str(file) for name, file in files.items()})
    assert tls.read().key == b"PEM"
    files[bad].unlink()
    with pytest.raises(ConfigurationError, match=rf"cluster\.tls\.{bad} .* cannot be read"):
        Security("s", tls).check("127.0.0.1")


def test_a_key_that_others_get_at_is_refused(tmp_path):
    for name in ("ca", "certificate", "key"):
        (tmp_path / name).write_text("PEM")
        (tmp_path / name).chmod(0o644)
    tls = TlsConfig(**{f"{name}_file": str(tmp_path / name) for name in ("ca", "certificate", "key")})
    with pytest.raises(ConfigurationError, match=r"cluster\.tls\.key_file .* has mode 0644"):
        tls.read()
