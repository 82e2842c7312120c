"""The options, and what is said of bad ones."""

import configargparse  # type: ignore[import-untyped]
import pytest

from loadtest.options import Options, add_arguments, check


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("workload", "poisson", "'lognormal', 'classic', 'sharegpt' or 'alpaca'"),
        ("input_mean", "0", "greater than or equal to 1"),
        ("output_mean", "many", "valid number"),
        ("sigma", "3.5", "less than or equal to 3"),
        ("sigma", "nan", "less than or equal to 3"),
        ("max_context", "8", "greater than or equal to 16"),
        ("requests", "-1", "greater than or equal to 0"),
        ("warmup", "1.5", "valid integer"),
        ("seed", "", "valid integer"),
        ("timeout", "0", "greater than 0"),
        ("hf_url", "localhost:8000", "https?://"),
        ("vllm_url", "ftp://localhost", "https?://"),
    ],
)
def test_a_bad_value_is_named_with_its_field_and_what_is_allowed(field: str, value: str, allowed: str) -> None:
    with pytest.raises(ValueError, match="^" + field) as refused:
        check({field: value})
    assert str(refused.value).startswith(f"{field}: {value!r}: ")
    assert allowed in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("timeout", "inf"), ("timeout", "1e12"), ("hf_url", "http://"), ("vllm_url", "http://host:99999")],
)
def test_what_no_connection_could_use_is_refused_before_the_run(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: {value!r}: "):
        check({field: value})


def test_every_bad_value_is_named() -> None:
    with pytest.raises(ValueError, match=r"input_mean: .*; sigma: "):
        check({"input_mean": "x", "sigma": "y"})


def test_other_options_of_locust_are_none_of_our_business() -> None:
    assert check({"users": "many", "requests": "7", "workload": "classic"}) == Options(requests=7, workload="classic")


def test_every_option_is_read_from_the_command_line_and_from_the_environment() -> None:
    parser = configargparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    assert check(vars(parser.parse_args([], env_vars={}))) == Options()
    variables = {"HEADROOM_LOADTEST_MAX_CONTEXT": "100", "HEADROOM_LOADTEST_INPUT_MEAN": "9.5"}
    chosen = vars(parser.parse_args(["--input-mean", "8.5", "--workload", "classic"], env_vars=variables))
    assert set(chosen) == set(Options.model_fields)
    assert check(chosen) == Options(max_context=100, input_mean=8.5, workload="classic")


def test_the_defaults_are_allowed() -> None:
    assert check({}) == Options()
    assert check(vars(Options())) == Options()
