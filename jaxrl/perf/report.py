"""Results in the published page's columns: the same cells on the terminal and in markdown."""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence

from jaxrl_kernels.validated import is_validated
from rich.markup import escape
from rich.table import Table

from jaxrl.models.presets import PRESETS
from jaxrl.perf.hardware import GPUS
from jaxrl.perf.results import Result, job_of

SHOW_PCT = 1.0  # the published page's rules: show differences from here on,
WARN_PCT = 5.0  # and warn of results that are worse by more

LEGEND = """\
- **planned**: the training step was really compiled by XLA for that GPU and count, on a machine
  without it. Peak Mem is XLA's buffer assignment (arguments + outputs - aliased + temporaries) of
  one device, in GiB (with cudnn, plus the workspace that its backward took on an H200). Nothing
  ran, so there are no MFU, TPS or times.
- **measured**: the step ran on that hardware. Step Time is the median, in seconds per micro-batch,
  with its interquartile range; Peak Mem is the largest of all devices.
- **proxy**: measured on the host named above: the same architecture with fewer layers and a shorter
  sequence (with experts, also 8 of them, 2 per token, and a vocabulary of 32,768). Its MFU is
  relative to the host's own measured matmul peak.
- **MFU** counts FLOPs as the published page does (no causal half, hidden_size for the attention
  width, the page's hardware peak), to compare with it. **MFU (causal)** counts what the model
  needs: the causal half, the real head_dim, the hardware's real peak. **HFU** adds recomputation.
- **RL e2e**: a whole step, in turns: rollouts, update, the new weights to the engine. MFU, HFU and
  TPS are the training step's FLOPs and tokens over the whole step's time; Step Time is also divided
  by the micro-batches. The phases are below the table.
- **Floor**: training state + saved layer inputs + one layer's working set (RL e2e: + the cache).
- In brackets: difference to the published row, from 1 % on; :warning: more than 5 % worse.
  Published RL Full rows also gather all weights each step; what counts here is their training step
  alone."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """Text, and whether it is worse than published (`warn`) or tells of a failure (`failed`)."""

    text: str
    warn: bool = False
    failed: bool = False


COLUMNS = (
    *("Type", "SeqLen", "AC", "Attn", "EP", "CP", "Hardware", "MFU", "TPS", "Step Time"),
    *("Peak Mem", "Mode", "Compiled Attn", "Floor", "MFU (causal)", "HFU"),
)
NONE = Cell("-")

type Body = Sequence[Sequence[Cell]]


def cells(result: Result) -> list[Cell]:
    """One row of the table, in the order of `COLUMNS`."""
    row = job_of(result).row
    failed = result["status"] != "ok"
    step = _number(result, "step_time_s", "{:.2f}s", better="low")
    peak = _number(result, "peak_mem_gib", "{:.1f} GiB", better="low")
    if result.get("step_time_iqr_s") is not None and step is not NONE:
        step = dataclasses.replace(step, text=f"{step.text}, IQR {result['step_time_iqr_s']:.2g}s")
    return [
        Cell(row.label + _cut(result)),
        Cell(str(row.seq_len)),
        Cell(row.ac.capitalize()),
        Cell(row.attn.upper() if row.attn.startswith("fa") else row.attn),
        Cell(str(row.ep)),
        Cell(str(row.cp) + (f" {row.cp_method}" if row.cp_method != "ulysses" else "")),
        Cell(row.hardware),
        _number(result, "mfu_primerl_pct", "{:.1f}%", better="high", published="mfu_pct"),
        _number(result, "tps", "tps", better="high"),
        step,
        Cell("failed", failed=True) if failed else peak,
        Cell(result["mode"]),
        Cell(result["attn_compiled"]) if result.get("attn_compiled") else NONE,
        _number(result, "floor_mem_gib", "{:.1f} GiB"),
        _number(result, "mfu_pct", "{:.1f}%"),
        _number(result, "hfu_pct", "{:.1f}%"),
    ]


def _cut(result: Result) -> str:
    """ ", 2 of 28 layers" for a proxy."""
    if result["mode"] != "proxy":
        return ""
    whole = PRESETS[result["model"]].num_layers if result["model"] in PRESETS else "?"
    return f", {result.get('num_layers', '?')} of {whole} layers"


def _number(result: Result, key: str, form: str, *, better: str = "", published: str = "") -> Cell:
    """A number, with its difference to the published one where `better` says how they compare."""
    value = result.get(key)
    if value is None:
        return NONE
    text = format_tps(value) if form == "tps" else form.format(value)
    base = result.get(f"baseline_{published or key}")
    if not better or not base:
        return Cell(text)
    change = 100 * (value / base - 1)
    warn = (change if better == "low" else -change) > WARN_PCT
    return Cell(f"{text} ({change:+.1f}%)" if abs(change) >= SHOW_PCT else text, warn)


def format_tps(tps: float) -> str:
    return f"{tps / 1000:.2f}k" if tps >= 1000 else f"{tps:.0f}"


def brief(result: Result) -> str:
    """What a finished row came to, in a few words."""
    if result["status"] != "ok":
        return f"failed: {result['error']}"
    shown = dict(zip(COLUMNS, cells(result), strict=True))
    names = [("Peak Mem", ""), ("TPS", " tokens/s"), ("MFU (causal)", " MFU")]
    return ", ".join(f"{shown[n].text}{unit}" for n, unit in names if shown[n] is not NONE) or "ok"


def notes(results: Sequence[Result]) -> list[str]:
    """Sentences under a table: what does not fit, and how it compares as a whole."""
    said = []
    for result in results:
        gpu, peak = GPUS.get(result["gpu"]), result.get("peak_mem_gib")
        if gpu and peak and peak > gpu.memory_gib:
            said.append(
                f"Does not fit: {job_of(result).row.title} needs {peak:.1f} GiB of the "
                f"{gpu.memory_gib:.1f} GiB of one {gpu.name}."
            )
        if result["mode"] == "proxy" and result.get("peak_flops"):
            said.append(
                f"The proxy's MFU is relative to {result['peak_flops'] / 1e9:.0f} GFLOP/s, this "
                "host's matmul peak as measured beside it."
            )
        if result.get("total_s"):
            phases = ("rollout", "wait", "train", "sync", "total")
            parts = ", ".join(f"{name} {result[f'{name}_s']:.3g} s" for name in phases)
            said.append(
                f"{job_of(result).row.title}: {parts} a step; "
                f"{format_tps(result['tokens_per_s_rollout'])} tokens/s drawn, "
                f"{format_tps(result['tokens_per_s_train'])} trained."
            )
        if result.get("decode_peak_gib"):
            said.append(
                f"{job_of(result).row.title}: {result['train_peak_gib']:.1f} GiB while training, "
                f"{result['decode_peak_gib']:.1f} GiB while decoding, the cache of "
                f"{result['cache_gib']:.1f} GiB in both."
            )
        if max(result.get("hfu_pct") or 0, result.get("mfu_pct") or 0) > 100:
            said.append(
                "A utilisation above 100 % is no result: the host was busy while its peak was "
                "measured. Run again on an idle one, with --config.resume=false."
            )
    unproven = {f"{r['attn_compiled']} on {r['gpu']}" for r in results if _not_validated(r)}
    if unproven:
        said.append(
            f"Attention not yet validated: {', '.join(sorted(unproven))}; its tests have not run "
            "there (pytest -m gpu)."
        )
    for what, key, verb in (
        ("the published peak", "baseline_peak_mem_gib", "use"),
        ("the floor", "floor_mem_gib", "are at"),
    ):
        compared = [
            (r["peak_mem_gib"] / r[key], job_of(r).row.title)
            for r in results
            if r.get("peak_mem_gib") and r.get(key) and r["mode"] != "proxy"
        ]
        if compared:
            mean = math.exp(sum(math.log(ratio) for ratio, _ in compared) / len(compared))
            worst, title = max(compared)
            said.append(
                f"Peak memory: {len(compared)} rows {verb} {mean:.2f} x {what} in geometric mean, "
                f"at worst {worst:.2f} x ({title})."
            )
    return said


def _not_validated(result: Result) -> bool:
    """Whether the row's attention is a kernel of ours that this GPU has not been shown to run."""
    gpu = GPUS.get(result["gpu"])
    if gpu is None or result.get("attn_compiled") != "triton":
        return False
    return not is_validated("attention triton", gpu.device_kinds[0])


def ordered(results: Sequence[Result]) -> list[Result]:
    """Proxies last, otherwise as they came."""
    return sorted(results, key=lambda r: r["mode"] == "proxy")


def by_model(results: Sequence[Result]) -> dict[str, list[Result]]:
    groups = collections.defaultdict(list)
    for result in results:
        groups[result["model"]].append(result)
    return {model: ordered(group) for model, group in groups.items()}


def markdown(results: Sequence[Result]) -> str:
    """BENCHMARKS.md."""
    lines = ["# Benchmarks", "", "Written by `python -m jaxrl.bench`.", "", *_origins(results)]
    lines += ["", LEGEND]
    for model, group in by_model(results).items():
        lines += ["", f"## {model}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        for result in group:
            lines.append("| " + " | ".join(map(_as_markdown, cells(result))) + " |")
        failed = [r for r in group if r["status"] != "ok"]
        if failed:
            lines += ["", "Failed:", ""]
            lines += [f"- {_name(r)}: {_escape(str(r['error']))}" for r in failed]
        if said := notes(group):
            lines += ["", *(f"- {note}" for note in said)]
    return "\n".join(lines) + "\n"


def _name(result: Result) -> str:
    return f"{job_of(result).row.title} ({result['mode']})"


def _as_markdown(cell: Cell) -> str:
    return _escape(cell.text) + (" :warning:" if cell.warn else "")


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _origins(results: Sequence[Result]) -> list[str]:
    """A table of where rows come from: commit, day, versions, host, flags; rows may differ."""
    count = collections.Counter(_origin(r) for r in results)
    lines = [
        "| Rows | Commit | Date (UTC) | Versions | Host | Flags |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {n} | " + " | ".join(origin) + " |" for origin, n in count.items()]
    return lines


def _origin(result: Result) -> tuple[str, ...]:
    versions = ", ".join(f"{k} {v}" for k, v in (result.get("versions") or {}).items())
    flags = " ".join(f"`{k}={v}`" for k, v in (result.get("flags") or {}).items())
    date = (result.get("date") or "-")[:10]
    commit, host = (str(result.get(k) or "-") for k in ("commit", "host"))
    return tuple(_escape(x or "-") for x in (commit, date, versions, host, flags))


def terminal(model: str, results: Sequence[Result], width: int) -> Iterator[Table | str]:
    """The same cells for a terminal of `width` columns, as things for rich to print.

    Where space is short there is a table per mode, units move into the headers, and what all rows
    of a table share is said once below it.
    """
    body = [cells(r) for r in ordered(results)]
    everything = range(len(COLUMNS))
    if _width(everything, body, COLUMNS, 2) <= width:
        yield f"\n[bold]{model}[/bold]"
        yield _table(everything, body, COLUMNS, 2)
        return
    for mode in dict.fromkeys(r["mode"] for r in ordered(results)):
        body = [cells(r) for r in results if r["mode"] == mode]
        shared = [i for i in everything if len({row[i].text for row in body}) == 1]
        said = [f"{COLUMNS[i]} {body[0][i].text}" for i in shared if body[0][i] != NONE]
        yield f"\n[bold]{model}, {mode}[/bold]"
        if len(shared) < len(COLUMNS):
            columns = [i for i in everything if i not in shared]
            body, headers = _compact(body)
            gap = 2 if _width(columns, body, headers, 2) <= width else 1
            yield _table(columns, body, headers, gap)
            yield f"[dim]All rows: {escape(', '.join(said))}.[/dim]"
        else:
            yield escape(", ".join(said))


def _compact(body: Body) -> tuple[list[list[Cell]], list[str]]:
    """Cells without " GiB", and headers that say it, in several lines."""
    headers = [name.replace(" ", "\n") for name in COLUMNS]
    rows = [list(row) for row in body]
    for i, name in enumerate(COLUMNS):
        if any(" GiB" in row[i].text for row in body):
            headers[i] = f"{name}\nGiB"
            for row in rows:
                row[i] = dataclasses.replace(row[i], text=row[i].text.replace(" GiB", ""))
    return rows, headers


def _table(columns: Sequence[int], body: Body, headers: Sequence[str], gap: int) -> Table:
    table = Table(box=None, padding=(0, gap, 0, 0))
    for i in columns:
        right = any(row[i].text[:1].isdigit() for row in body) and COLUMNS[i] != "Hardware"
        justify = "right" if right else "left"
        table.add_column(headers[i], justify=justify, no_wrap=True, vertical="bottom")
    for row in body:
        table.add_row(*(_as_rich(row[i]) for i in columns))
    return table


def _width(columns: Sequence[int], body: Body, headers: Sequence[str], gap: int) -> int:
    def width(i: int) -> int:
        return max(map(len, headers[i].split("\n") + [_plain(row[i]) for row in body]))

    return sum(gap + width(i) for i in columns)


def _plain(cell: Cell) -> str:
    return f"{cell.text} !" if cell.warn else cell.text


def _as_rich(cell: Cell) -> str:
    style = "red" if cell.failed else "yellow" if cell.warn else ""
    return f"[{style}]{escape(_plain(cell))}[/]" if style else escape(cell.text)
