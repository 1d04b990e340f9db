"""The environment is made with uv, from the places that pip is configured with."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "setup_environment.py"
_SPEC = importlib.util.spec_from_file_location("setup_environment", _SCRIPT)
assert _SPEC and _SPEC.loader
setup_environment = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(setup_environment)


def test_uv_looks_where_pip_would():
    told = "\n".join(
        (
            ":env:.cert='/certificates.pem'",
            ":env:.default-timeout='60'",
            r"global.extra-index-url='https://one.example/simple\nhttps://two.example/simple'",
            r"global.find-links='/wheels\n/more'",
            "global.index-url='https://index.example/simple'",
        )
    )
    assert setup_environment.uv_settings(told) == {
        "SSL_CERT_FILE": "/certificates.pem",
        "UV_INDEX": "https://one.example/simple https://two.example/simple",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_DEFAULT_INDEX": "https://index.example/simple",
    }


def test_a_variable_of_pips_goes_before_its_files():
    told = ":env:.index-url='https://variable.example'\nuser.index-url='https://file.example'"
    assert setup_environment.uv_settings(told) == {"UV_DEFAULT_INDEX": "https://variable.example"}


def test_pip_without_a_configuration_tells_uv_nothing():
    assert setup_environment.uv_settings("") == {}
