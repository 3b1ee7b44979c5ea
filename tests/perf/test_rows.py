"""Rows: reading, filtering, and refusing what can never run."""

import dataclasses

import pytest

from jaxrl.config import ConfigError
from jaxrl.perf.rows import Row, check_rows, filter_rows, names, parse_row, proxy_row

MODEL = "Qwen3-0.6B"
MOE = "Qwen3-30B-A3B-Instruct-2507"
LORA = "rl lora16 16384 recompute fa3 8xH100"


def rows(*texts):
    return [parse_row(MODEL, text) for text in texts]


def test_parse():
    row = parse_row(MODEL, LORA + " ep2 cp4")
    assert row == Row(MODEL, "rl", 16, 16384, "recompute", "fa3", 2, 4, 8, "H100")
    assert row.title == LORA + " ep2 cp4"
    assert parse_row(MODEL, row.title) == row == parse_row(MODEL, row.title + " ulysses")
    ring = parse_row(MODEL, LORA.replace("fa3", "fa2") + " cp4 ring")
    assert ring.title.endswith("8xH100 cp4 ring") and parse_row(MODEL, ring.title) == ring
    assert (row.num_hosts, parse_row(MODEL, LORA.replace("8x", "12x")).num_hosts) == (1, 2)
    assert (row.label, row.hardware) == ("RL LoRA(r=16)", "8xH100")
    assert parse_row(MODEL, "sft full 8192 none xla 1xB200").label == "SFT Full"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rl full 16384 recompute fa3", "cannot read row"),
        ("rl full 16384 recompute fa3 H100", "cannot read row"),
        ("rl half 16384 recompute fa3 1xH100", "cannot read row"),
        (LORA + " tp2", "cannot read row"),
        (LORA + " ring cp2", "cannot read row"),
        ("dpo full 16384 recompute fa3 1xH100", "unknown type 'dpo'; one of rl, sft"),
        ("rl full 16384 some fa3 1xH100", "unknown ac 'some'; one of none, recompute"),
        ("rl full 16384 none fa5 1xH100", "unknown attn 'fa5'; one of fa2, fa3"),
        ("rl lora0 16384 none fa3 1xH100", "write 'full'"),
    ],
)
def test_unreadable_rows(text, words):
    with pytest.raises(ConfigError, match=".*".join(words.split("; "))) as error:
        parse_row(MODEL, text)
    assert text in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rl full 1000 none fa3 1xH100", "seq_len 1000 is no positive multiple of 128; use 1024"),
        ("rl full 0 none fa3 1xH100", "seq_len 0 is no positive multiple of 128; use 128"),
        ("rl full -128 none fa3 1xH100", "seq_len -128 is no positive multiple of 128; use 128"),
        ("rl full 128 none fa3 0xH100", "0 GPUs; use at least 1"),
        ("rl full 128 none fa3 1xH300", "unknown GPU 'H300'; did you mean H200 or H100?"),
        (
            "rl full 128 none fa3 1xB200",
            "attention fa3 needs Hopper (sm_90), and B200 is sm_100; "
            "use fa4 or fa2 or cudnn or xla or auto",
        ),
        (
            "rl full 128 none fa4 1xH100",
            "attention fa4 needs Blackwell (sm_100), and H100 is sm_90",
        ),
        ("rl full 128 none fa3 1xA6000", "attention fa3 needs Hopper (sm_90), and A6000 is sm_86"),
        (
            "rl full 128 none tokamax 1xA6000",
            "attention tokamax needs Hopper or Blackwell (sm_90, sm_100), and A6000 is sm_86",
        ),
        ("rl full 128 none fa3 8xH100 ep3", "ep 3 does not divide 8 GPUs; use 1 or 2 or 4 or 8"),
        (
            "rl full 128 none fa3 8xH100 ep2",
            "ep 2 needs experts, and Qwen3-0.6B is dense; use ep 1",
        ),
        ("rl full 512 none fa3 8xH100 cp3", "cp 3 does not divide 8 GPUs; use 1 or 2 or 4 or 8"),
        (
            "rl full 512 none fa3 8xH100 ep4 cp4",
            "ep 4 x cp 4 does not divide 8 GPUs; beside ep 4 use cp 1 or 2",
        ),
        (
            "rl full 384 none fa3 8xH100 cp2",
            "cp 2 leaves no multiple of 128 of seq_len 384 to a device; use cp 1, or seq_len 512",
        ),
        (
            "rl full 4096 none fa3 32xH100 cp32",
            "does not split num_heads 16 with num_kv_heads 8; use one of [1, 2, 4, 8, 16], or the "
            "context method 'ring'",
        ),
        (
            "rl full 512 none fa3 8xH100 cp2 ring",
            "attention fa3 cannot run in a ring; use ulysses, or ring with fa2 or triton or xla",
        ),
    ],
)
def test_impossible_rows(text, words):
    with pytest.raises(ConfigError) as error:
        check_rows(rows(text))
    assert words in str(error.value)
    assert str(error.value).startswith(f"row '{text}': ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "rl full 128 none fa3 12xH100 ep4",
            "128 experts do not spread evenly over 12 GPUs; use 4 or 8 or 16 or 32 or 64 or 128 "
            "GPUs",
        ),
        ("rl full 128 none fa3 12xH100 ep3", "use an ep that divides 128"),
        ("rl full 128 none fa3 3xH100", "128 experts do not spread evenly over 3 GPUs; use 1 or 2"),
    ],
)
def test_experts_are_divided_over_all_gpus(text, words):
    with pytest.raises(ConfigError) as error:
        check_rows([parse_row(MOE, text)])
    assert words in str(error.value)


def test_a_ring_needs_devices():
    with pytest.raises(ConfigError, match="ring splits sequences over devices; add cp2 or more"):
        check_rows(rows(LORA.replace("fa3", "fa2") + " ring"))


def test_parallel_rows_that_run():
    texts = ("ep8", "ep2 cp4", "cp8", "ep4 cp2")
    check_rows([parse_row(MOE, f"{LORA} {axes}") for axes in texts])
    check_rows(rows(*(f"{LORA.replace('fa3', 'fa2')} cp{n} ring" for n in (2, 8))))
    check_rows([parse_row("INTELLECT-3", "rl full 16384 recompute fa3 64xH200 ep8 cp2")])


def test_unknown_model():
    with pytest.raises(ConfigError, match=r"unknown model 'Qwen3-4'; did you mean .*Qwen3-4B"):
        check_rows([parse_row("Qwen3-4", LORA)])


def test_attention_that_runs():
    check_rows(
        rows(
            "rl full 128 none fa2 1xA6000",
            "rl full 128 none cudnn 1xB200",
            "rl full 128 none fa4 1xB200",
            "rl full 128 none xla 1xA100",
            LORA,
        )
    )


def test_filter():
    table = rows(
        LORA,
        "rl full 16384 recompute fa3 1xH100",
        "rl full 65536 recompute fa2 1xA6000",
        "sft full 8192 recompute fa2 8xB200",
    )
    assert filter_rows(table, "") == table
    assert filter_rows(table, "gpu=h100, num_gpus=1") == table[1:2]
    assert filter_rows(table, "gpu=H100|A6000") == table[:3]
    assert filter_rows(table, "lora_rank=full,type=rl") == table[1:3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpus=H100", "write field=value or field=a|b; fields: model, type, lora_rank"),
        ("H100", "write field=value"),
        ("gpu=H300", "leaves no row; gpu of the rows: H100"),
        ("gpu=H100,seq_len=8192", "leaves no row; seq_len of the rows with gpu=H100: 16384"),
    ],
)
def test_filter_that_finds_nothing_says_what_there_is(text, words):
    with pytest.raises(ConfigError) as error:
        filter_rows(rows(LORA), text)
    assert words in str(error.value)


def test_a_row_may_name_its_model():
    assert parse_row("", f"{MODEL} {LORA}") == parse_row(MODEL, LORA)
    assert parse_row(MODEL, f"{MOE} {LORA}").model == MOE
    with pytest.raises(ConfigError, match=r"of which model\? begin with its name, or set config"):
        parse_row("", LORA)
    with pytest.raises(ConfigError, match=r"unknown model 'Qwen3-0.6'; did you mean Qwen3-0\.6B"):
        check_rows([parse_row(MODEL, f"Qwen3-0.6 {LORA}")])


def test_rows_of_several_models_are_called_by_theirs():
    both = [parse_row(MODEL, LORA), parse_row(MOE, LORA)]
    assert list(names(both[:1]).values()) == [LORA]
    assert list(names(both).values()) == [f"{MODEL} {LORA}", f"{MOE} {LORA}"]


def test_proxy_row():
    row = proxy_row(parse_row(MODEL, LORA), 256)
    assert dataclasses.asdict(row) == dataclasses.asdict(parse_row(MODEL, LORA)) | {
        "seq_len": 256,
        "attn": "xla",
        "num_gpus": 1,
        "gpu": "CPU",
    }
