"""Settings to vLLM's arguments and environment."""

import sys

import pytest

from servers.models import Model
from servers.settings import parse
from servers.vllm.__main__ import main
from servers.vllm.launch import PROGRAM, Settings, arguments, environment, explained, raised, second_size

GPT2 = Model("gpt2", "gpt2")
RANDOM = Model("random:llama-7b", "/cache/llama", weights=False)


def settings(*command_line: str) -> Settings:
    return parse(Settings, PROGRAM, command_line)


def option(command: list[str], name: str) -> str | None:
    return command[command.index(name) + 1] if name in command else None


def test_the_whole_command_by_default() -> None:
    assert arguments(settings("--port", "9001"), GPT2, gpu=True) == [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", "gpt2", "--served-model-name", "gpt2", "--host", "127.0.0.1", "--port", "9001"),
        *("--dtype", "bfloat16", "--generation-config", "vllm"),
        *("--no-enable-prefix-caching", "--disable-uvicorn-access-log"),
    ]


def test_every_setting_has_its_argument() -> None:
    given = "--max-model-len 512 --max-num-seqs 32 --gpu-memory-utilization 0.8 --dtype float16 --enforce-eager"
    command = arguments(settings(*given.split(), "--prefix-caching"), GPT2, gpu=True)
    assert option(command, "--max-model-len") == "512"
    assert option(command, "--max-num-seqs") == "32"
    assert option(command, "--gpu-memory-utilization") == "0.8"
    assert option(command, "--dtype") == "float16"
    assert {"--enforce-eager", "--enable-prefix-caching"} < set(command)
    assert "--no-enable-prefix-caching" not in command


@pytest.mark.parametrize("gpu", [True, False])
def test_the_budget_is_the_size_of_the_pool_in_bytes(gpu: bool) -> None:
    chosen = settings("--kv-budget", "9000000")
    assert option(arguments(chosen, GPT2, gpu), "--kv-cache-memory-bytes") == "9000000"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment(chosen, gpu, {})


def test_beside_a_budget_the_share_of_the_gpu_that_must_be_free_is_still_given() -> None:
    command = arguments(settings("--kv-budget", "9000000", "--gpu-memory-utilization", "0.5"), GPT2, gpu=True)
    assert option(command, "--gpu-memory-utilization") == "0.5"


def test_metrics_of_each_request_are_asked_for() -> None:
    assert "--enable-per-request-metrics" in arguments(settings("--per-request-metrics"), GPT2, gpu=True)


@pytest.mark.parametrize(
    ("command_line", "inherited", "named"),
    [
        ("--cpu-kv-cache-gib 1", {}, "--cpu-kv-cache-gib 1"),
        ("", {"VLLM_CPU_KVCACHE_SPACE": "4"}, "the environment's VLLM_CPU_KVCACHE_SPACE=4"),
        ("-- --num-gpu-blocks-override 9", {}, "vLLM's --num-gpu-blocks-override"),
        ("-- --seed 1 --kv_cache_memory_bytes=1G", {}, "vLLM's --kv-cache-memory-bytes"),
        ("-- --kv-cache-memory=5", {}, "vLLM's --kv-cache-memory"),
    ],
)
def test_a_second_size_of_the_pool_is_found_beside_a_budget(
    command_line: str, inherited: dict[str, str], named: str
) -> None:
    assert second_size(settings("--kv-budget", "9000000", *command_line.split()), False, inherited) == named
    assert second_size(settings(*command_line.split()), False, inherited) is None


@pytest.mark.parametrize("passed", ["--block-size 16", "--kv-cache-dtype auto", "-- --help", "-tp 1"])
def test_what_sizes_no_pool_may_be_passed_on_beside_a_budget(passed: str) -> None:
    chosen = settings("--kv-budget", "9000000", "--gpu-memory-utilization", "0.5", "--", *passed.split())
    assert second_size(chosen, True, {"VLLM_CPU_KVCACHE_SPACE": "4"}) is None
    assert second_size(chosen, False, {"VLLM_CPU_KVCACHE_SPACE": ""}) is None


def test_a_second_size_exits_with_2_and_both_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["servers.vllm", "--kv-budget", "9000000", "--cpu-kv-cache-gib", "2"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert "--kv-budget 9000000: --cpu-kv-cache-gib 2 sizes the KV cache too" in capsys.readouterr().err


def test_both_servers_have_the_same_number_format_on_a_cpu() -> None:
    assert option(arguments(settings(), GPT2, gpu=False), "--dtype") == "float32"


def test_a_share_of_gpu_memory_means_nothing_on_a_cpu() -> None:
    assert "--gpu-memory-utilization" not in arguments(settings("--gpu-memory-utilization", "0.8"), GPT2, gpu=False)


def test_a_model_without_weights_gets_them_in_place_under_the_name_that_was_asked_for() -> None:
    command = arguments(settings(), RANDOM, gpu=True)
    assert option(command, "--load-format") == "dummy"
    assert (option(command, "--model"), option(command, "--served-model-name")) == ("/cache/llama", "random:llama-7b")


def test_a_model_with_weights_has_them_loaded() -> None:
    assert "--load-format" not in arguments(settings(), Model("random:tiny", "/cache/tiny"), gpu=True)


@pytest.mark.parametrize(
    "passed",
    [
        ["--block-size", "16", "--port", "5"],
        ["--cuda-graph-sizes", "1,2,4"],
        ["--compilation-config", '{"level": 3, "sizes": [1, 2]}'],
        ['--override={"a": 1}'],
        ["--served-model-name", '"quoted"', "a b", "it's", "null", "[1,2]", ""],
        ["--", "--help"],
    ],
    ids=" ".join,
)
def test_what_follows_two_dashes_is_passed_on_as_it_is_and_last(passed: list[str]) -> None:
    chosen = settings("--port", "9001", "--", *passed)
    assert chosen.port == 9001
    assert arguments(chosen, GPT2, gpu=True)[-len(passed) :] == passed


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        ("--gpu-memory-utilization 1.5", "--gpu-memory-utilization: '1.5': Input should be less than or equal to 1"),
        ("--max-num-seqs 0", "--max-num-seqs: '0': Input should be greater than or equal to 1"),
        ("--kv-budget 0", "--kv-budget: '0': Input should be greater than or equal to 1"),
        ("--port 0", "--port: '0': Input should be greater than or equal to 1"),
        ("--cpu-kv-cache-gib 0.5", "--cpu-kv-cache-gib: '0.5': Input should be a valid integer"),
        ("--block-size 16", "--block-size"),
    ],
)
def test_a_bad_setting_exits_with_2_and_is_named(
    command_line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        settings(*command_line.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_variable_that_is_no_list_exits_with_2_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADROOM_VLLM_PASSED_ON", "--block-size 16")
    with pytest.raises(SystemExit) as exit_:
        settings()
    assert exit_.value.code == 2
    assert "passed" in capsys.readouterr().err


def test_on_a_gpu_nothing_of_the_cpu_is_set() -> None:
    assert environment(settings(), gpu=True, inherited={"PATH": "/bin"}) == {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PATH": "/bin",
    }


def test_on_a_cpu_the_pool_and_the_cores_are_set() -> None:
    chosen = environment(settings("--cpu-kv-cache-gib", "3", "--threads", "1"), gpu=False, inherited={})
    assert chosen["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert chosen["VLLM_CPU_OMP_THREADS_BIND"].isdecimal()


def test_what_the_user_has_set_stays() -> None:
    inherited = {"VLLM_CPU_KVCACHE_SPACE": "9", "VLLM_NO_USAGE_STATS": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    assert environment(settings(), gpu=False, inherited=inherited).items() >= inherited.items()
    assert inherited == {
        "VLLM_CPU_KVCACHE_SPACE": "9",
        "VLLM_NO_USAGE_STATS": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("ValueError: too small", "ValueError: too small"),
        ("(EngineCore_DP0 pid=12) ERROR 11-21 12:12:48 [core.py:1510] ValueError: no", "ValueError: no"),
        (
            "(Worker_TP0 pid=12) torch.OutOfMemoryError: CUDA out of memory.",
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        ("    raise ValueError(", None),
        ("(APIServer pid=9) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig", None),
        ("(APIServer pid=9) WARNING 11-21 12:12:19 [utils.py:255] errors like `OSError: [Errno 24] Too many`", None),
        ("(APIServer pid=9) WARNING 11-21 12:12:19 [utils.py:255] ImportError: left out", None),
    ],
)
def test_the_end_of_a_traceback_is_told_from_other_lines(line: str, error: str | None) -> None:
    assert raised(line + "\n") == error


# What vLLM 0.26 and 0.32 say.
TOO_LONG = (
    "ValueError: To serve at least one request with the model's max seq len (2048), (0.01 GiB KV cache is needed, which"
    " is larger than the available KV cache memory (0.01 GiB). {}Try increasing `gpu_memory_utilization` or decreasing"
)
FITS = "Based on the available memory, the estimated maximum model length is 1920. "


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (TOO_LONG.format(FITS), "one sequence of 2048 tokens; give more bytes or --max-model-len 1920"),
        (TOO_LONG.format(""), "one sequence of 2048 tokens; give more bytes or a smaller --max-model-len"),
        ("ValueError: No available memory for the cache blocks. Try", "one block of its cache; give more bytes"),
    ],
)
def test_a_budget_that_is_too_small_is_named(error: str, advice: str) -> None:
    assert explained(settings("--kv-budget", "77"), error) == f"--kv-budget 77: vLLM cannot hold {advice}"
    assert explained(settings(), error) == f"vLLM's error: {error}"


def test_another_error_is_handed_on_as_it_is() -> None:
    assert (
        explained(settings("--kv-budget", "77"), "ValueError: no such dtype")
        == "vLLM's error: ValueError: no such dtype"
    )
