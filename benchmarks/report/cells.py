"""What a record holds, as text: numbers, intervals, headings, and the line that says how it came about."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]

#: Every column of a table of maps: heading and whether more is better.
COLUMNS: dict[str, tuple[str, bool]] = {
    "nra": ("NRA", True),
    "nra_exact": ("NRA exact", True),
    "specificity": ("specificity", True),
    "hit_rate": ("hit rate", True),
    "iou": ("IoU", True),
    "box_iou": ("box IoU", True),
    "epg": ("EPG", True),
    "average_drop": ("average drop", False),
    "increase_in_confidence": ("increase in confidence", True),
}
#: What the rows of maps made worse on purpose are called.
SHUFFLED, OTHER = "maps shuffled between images", "maps of another target"

#: Not results, but how they came about: shown in one line.
CIRCUMSTANCES = (
    "environment", "arguments", "seed", "seeds", "date", "python", "machine", "device", "threads", "versions", "torch",
    "benchmark", "details", "sources",
)  # fmt: skip


def is_interval(value: Any) -> bool:
    """``[value, low, high]``, with None for what is not defined; three numbers out of order are a list of numbers."""
    if not isinstance(value, list) or len(value) != 3:
        return False
    if not all(v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in value):
        return False
    return None in value or value[1] - 1e-9 <= value[0] <= value[2] + 1e-9


def number(value: float, digits: int = 3) -> str:
    """Three significant digits, without an exponent where it can be avoided."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (abs(value) >= 1000 and float(value).is_integer()):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def fixed(value: float, digits: int = 2) -> str:
    """Without a minus before nothing but zeros."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def bracketed(value: list[Any] | float | None, digits: int = 2) -> str:
    """``0.43 [0.39, 0.50]``; a number without an interval alone."""
    if isinstance(value, (int, float)):
        return number(value)
    middle, low, high = value or (None, None, None)
    if middle is None:
        return ""
    if low is None:
        return fixed(middle, digits)
    return f"{fixed(middle, digits)} [{fixed(low, digits)}, {fixed(high, digits)}]"


def cell(value: Any) -> str:
    """Anything a record holds, as one cell."""
    if value is None:
        return ""
    if is_interval(value):
        return bracketed(value)
    if isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, list):
        return ", ".join(cell(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {cell(v)}" for k, v in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ")


def words(key: str) -> str:
    """A key as a heading."""
    return key.replace("_", " ")


def circumstances(record: Record) -> str:
    """When, where, with which versions, arguments and seeds: one line."""
    env = {**record, **record.get("environment", {})}
    parts = []
    if "date" in env:
        where = [str(env[k]) for k in ("machine", "device") if env.get(k) and env[k] != "cpu"]
        threads = env.get("threads")
        where += [f"{threads} thread{'s' if threads != 1 else ''}"] if threads else []
        where += ["no GPU"] if env.get("device") == "cpu" else []
        parts.append(f"Recorded {env['date']} on {', '.join(where)}")
    versions = {"Python": env.get("python"), **env.get("versions", {})}
    if env.get("torch"):
        versions["torch"] = env["torch"]
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    parts += [shown] if shown else []
    given = {k: v for k, v in record.get("arguments", {}).items() if v not in (None, {}, [])}
    for key in ("seed", "seeds"):
        if key in record:
            given[key] = record[key]
    given = {k: v for k, v in given.items() if not (isinstance(v, str) and "/" in v)}  # folders are nobody's business
    shown_as = {k: ", ".join(map(cell, v)) if isinstance(v, list) else cell(v) for k, v in given.items()}
    parts += ["; ".join(f"{words(k)} {v}" for k, v in shown_as.items())] if given else []
    return f"<sub>{'. '.join(parts)}.</sub>" if parts else ""
