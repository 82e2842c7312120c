"""The options, and what is said of bad ones."""

import re

import configargparse  # type: ignore[import-untyped]
import pytest

from loadtest.options import Options, add_arguments, check, check_variables


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("workload", "poisson", "'sharegpt', 'alpaca', 'synthetic', 'dataset' or 'trace'"),
        ("input_mean", "0", "greater than or equal to 1"),
        ("output_mean", "many", "valid number"),
        ("sigma", "3.5", "less than or equal to 3"),
        ("sigma", "nan", "finite number"),
        ("max_context", "8", "greater than or equal to 16"),
        ("requests", "-1", "greater than or equal to 0"),
        ("warmup", "1.5", "valid integer"),
        ("seed", "", "valid integer"),
        ("timeout", "0", "greater than 0"),
        ("hf_url", "localhost:8000", "https?://"),
        ("vllm_url", "ftp://localhost", "https?://"),
        ("arrival", "burst", "'closed', 'constant', 'poisson', 'gamma', 'steps', 'ramp' or 'trace'"),
        ("rate", "-1", "greater than or equal to 0"),
        ("rate", "inf", "finite number"),
        ("rate", "nan", "finite number"),
        ("rate", "1e7", "less than or equal to 1000000"),
        ("input_mean", "inf", "finite number"),
        ("burstiness", "0", "greater than 0"),
        ("burstiness", "nan", "greater than 0"),
        ("stages", "5x", "expected RATExSECONDS or FROM-TOxSECONDS"),
        ("stages", "0x9", "expected a rate above 0"),
        ("time_scale", "0", "greater than 0"),
        ("turns", "0", "greater than or equal to 1"),
        ("skip_bad_lines", "perhaps", "valid boolean"),
        ("endpoint", "responses", "'completions' or 'chat'"),
        ("retries", "11", "less than or equal to 10"),
        ("token_timeout", "-1", "greater than or equal to 0"),
        ("stamps", "hardware", "'auto', 'kernel' or 'user'"),
    ],
)
def test_a_bad_value_is_named_with_its_field_and_what_is_allowed(field: str, value: str, allowed: str) -> None:
    with pytest.raises(ValueError, match="^" + field) as refused:
        check({field: value})
    assert str(refused.value).startswith(f"{field}: {value!r}: ")
    assert allowed in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "Value error" not in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("timeout", "inf"), ("timeout", "1e12"), ("hf_url", "http://"), ("vllm_url", "http://host:99999")],
)
def test_what_no_connection_could_use_is_refused_before_the_run(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: {value!r}: "):
        check({field: value})


@pytest.mark.parametrize("given", ["http://me:sesame@host:8000", "http://sesame@host", "ftp://me:ses@ame@host/v1"])
def test_an_address_with_a_password_is_refused_without_showing_it(given: str) -> None:
    with pytest.raises(ValueError, match=r"^hf_url: 'http://\*\*\*@host|^hf_url: 'ftp:") as refused:
        check({"hf_url": given})
    assert "ame" not in str(refused.value)
    if given.startswith("http"):
        assert str(refused.value).endswith("keys come from HEADROOM_HF_API_KEY, HEADROOM_VLLM_API_KEY")


def test_an_address_with_a_query_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^vllm_url: 'http://host/\?a=b': .*expected nothing after the path$"):
        check({"vllm_url": "http://host/?a=b"})


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("http://host/v1", "http://host"),
        ("http://host:8000/v1/", "http://host:8000"),
        ("https://host/hf/v1", "https://host/hf"),
        ("http://v1", "http://v1"),
        ("http://host/v12", "http://host/v12"),
        ("http://host/", "http://host/"),
    ],
)
def test_an_address_may_be_given_with_the_v1_that_all_paths_begin_with(given: str, kept: str) -> None:
    assert check({"hf_url": given}).hf_url == kept


def test_every_bad_value_is_named() -> None:
    with pytest.raises(ValueError, match=r"input_mean: .*; sigma: "):
        check({"input_mean": "x", "sigma": "y"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arrival": "constant"}, "rate: 0.0: arrival constant needs a rate above 0 requests per second"),
        ({"arrival": "gamma", "rate": "0"}, "rate: 0.0: arrival gamma needs a rate above 0 requests per second"),
        ({"rate": "5"}, "rate: 5.0: is not read by arrival closed; expected arrival constant or poisson or gamma"),
        ({"arrival": "steps"}, "stages: '': arrival steps needs stages such as 5x30,10x30"),
        ({"arrival": "ramp"}, "stages: '': arrival ramp needs stages such as 1-20x60"),
        (
            {"arrival": "steps", "stages": "1-5x3"},
            "stages: '1-5x3': a rate that changes inside a stage needs arrival ramp",
        ),
        ({"arrival": "trace"}, "trace: '': arrival trace needs a trace file"),
        ({"workload": "trace"}, "trace: '': workload trace needs a trace file"),
        ({"trace": "x.csv"}, "trace: 'x.csv': is read by arrival trace and workload trace alone"),
        ({"time_scale": "2"}, "time_scale: 2.0: is not read by arrival closed; expected arrival trace"),
        (
            {"input_lengths": "zipf"},
            "input_lengths: 'zipf': is not read by workload lognormal; expected workload synthetic",
        ),
        (
            {"input_mean": "5", "workload": "classic"},
            "input_mean: 5.0: is not read by workload classic; expected workload lognormal or synthetic",
        ),
        (
            {"output_mean": "5", "workload": "sharegpt"},
            "output_mean: 5.0: is not read by workload sharegpt; expected workload lognormal or synthetic or dataset",
        ),
        (
            {"sigma": "0", "workload": "dataset", "dataset": "x.json"},
            "sigma: 0.0: is not read by workload dataset; expected workload lognormal or synthetic",
        ),
        (
            {"input_histogram": "x.csv"},
            "input_histogram: 'x.csv': is not read by workload lognormal; expected workload synthetic",
        ),
        (
            {"output_histogram": "x.csv", "workload": "synthetic"},
            "output_histogram: 'x.csv': is not read by output_lengths lognormal",
        ),
        (
            {"workload": "synthetic", "input_lengths": "empirical", "input_histogram": "x.csv", "input_mean": "5"},
            "input_mean: 5.0: is not read by input_lengths empirical",
        ),
        ({"until_file": "x"}, "until_file: 'x': is not read without min_seconds, after which it is waited for"),
        ({"drain": "3"}, "drain: 3: is not read without requests, which it follows"),
        (
            {"workload": "synthetic", "output_lengths": "empirical"},
            "output_histogram: '': output_lengths empirical needs a CSV file of length,count",
        ),
        ({"prefix_groups": "2"}, "prefix_tokens: 0: prefix_groups and prefix_tokens need each other"),
        ({"prefix_tokens": "2"}, "prefix_groups: 0: prefix_groups and prefix_tokens need each other"),
        ({"turns": "2", "workload": "classic"}, "turns: 2: needs synthetic prompts, not workload classic"),
        ({"workload": "dataset"}, "dataset: '': workload dataset needs a file or folder"),
        (
            {"dataset": "x.json"},
            "dataset: 'x.json': is not read by workload lognormal; expected dataset, sharegpt or alpaca",
        ),
        (
            {"endpoint": "chat"},
            "tokenizer: '': endpoint chat needs one, to make text of exact length for workload lognormal",
        ),
        (
            {"arrival": "poisson", "workload": "dataset"},
            "rate: 0.0: arrival poisson needs a rate above 0 requests per second; "
            "dataset: '': workload dataset needs a file or folder",
        ),
    ],
)
def test_options_that_do_not_fit_together_are_named_with_what_is_needed(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(given)


@pytest.mark.parametrize(
    "given",
    [
        {"arrival": "gamma", "rate": "5", "burstiness": "inf"},
        {"arrival": "steps", "stages": "5x30,10x30"},
        {"arrival": "ramp", "stages": "1-20x60,20x10"},
        {"arrival": "trace", "trace": "x.csv", "time_scale": "0.5"},
        {"workload": "trace", "trace": "x.csv", "arrival": "poisson", "rate": "2"},
        {"workload": "sharegpt", "dataset": "x.json", "endpoint": "chat"},
        {"workload": "classic", "endpoint": "chat"},
        {"workload": "sharegpt", "dataset": "x.json", "output_mean": "9"},
        {"workload": "dataset", "dataset": "x.json", "output_mean": "9"},
        {"workload": "synthetic", "input_lengths": "constant", "output_lengths": "normal", "sigma": "0.1"},
        {"workload": "synthetic", "input_lengths": "empirical", "input_histogram": "x.csv", "output_mean": "9"},
        {"turns": "3", "prefix_groups": "2", "prefix_tokens": "9", "workload": "alpaca"},
    ],
)
def test_options_that_fit_together_are_allowed(given: dict[str, str]) -> None:
    assert (
        check(given).model_dump().items()
        >= {key: given[key] for key in ("arrival", "workload") if key in given}.items()
    )


def test_the_total_holds_warm_up_and_drain_and_is_open_without_a_number_of_requests() -> None:
    assert Options(requests=7, warmup=2, drain=3).total == 12
    assert Options(warmup=2).total is None


def test_a_switch_is_on_when_it_is_named() -> None:
    parser = configargparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    assert check(vars(parser.parse_args(["--skip-bad-lines"], env_vars={}))).skip_bad_lines
    assert check(vars(parser.parse_args([], env_vars={"HEADROOM_LOADTEST_SKIP_BAD_LINES": "true"}))).skip_bad_lines
    assert not check(vars(parser.parse_args([], env_vars={}))).skip_bad_lines
    # As Locust's web form sends it.
    assert [check({"skip_bad_lines": value}).skip_bad_lines for value in ("true", "false")] == [True, False]


def test_other_options_of_locust_are_none_of_our_business() -> None:
    assert check({"users": "many", "requests": "7", "workload": "classic"}) == Options(requests=7, workload="classic")


def test_every_option_is_read_from_the_command_line_and_from_the_environment() -> None:
    parser = configargparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    assert check(vars(parser.parse_args([], env_vars={}))) == Options()
    variables = {"HEADROOM_LOADTEST_MAX_CONTEXT": "100", "HEADROOM_LOADTEST_INPUT_MEAN": "9.5"}
    chosen = vars(parser.parse_args(["--input-mean", "8.5", "--workload", "synthetic"], env_vars=variables))
    assert set(chosen) == set(Options.model_fields)
    assert check(chosen) == Options(max_context=100, input_mean=8.5, workload="synthetic")


def test_a_variable_that_is_no_option_is_refused_with_the_closest_that_is_one() -> None:
    check_variables([*(f"HEADROOM_LOADTEST_{name.upper()}" for name in Options.model_fields), "HEADROOM_HF_API_KEY"])
    expected = "HEADROOM_LOADTEST_REQEUSTS: is no option; expected HEADROOM_LOADTEST_REQUESTS"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        check_variables(["HEADROOM_LOADTEST_REQEUSTS", "HEADROOM_LOADTEST_SEED", "PATH"])


def test_the_defaults_are_allowed() -> None:
    assert check({}) == Options()
    assert check(vars(Options())) == Options()


def test_defaults_are_of_the_type_of_their_field() -> None:
    # Locust turns what its web form sends into the type of the default: with 1 for 1.0 it would refuse 1.5.
    fields = Options.model_fields.items()
    assert [name for name, field in fields if field.annotation is float and not isinstance(field.default, float)] == []
