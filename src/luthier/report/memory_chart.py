"""What memory goes into: stacked bars of a plan's parts, and a mark where the measured peak was."""

from luthier.report.marks import WIDTH, colour, framed, legend, shortened
from luthier.report.schema import Report, TuningReport
from luthier.report.table import size

_LEFT, _RIGHT, _PITCH = 168, 60, 30


def memory_chart(report: Report) -> str:
    """Planned bytes by part of every tuning; empty where nothing was planned."""
    planned = {name: tuning for name, tuning in report.tunings.items() if tuning.planned}
    if not planned:
        return ""
    names = [
        part for part in next(iter(planned.values())).planned if any(one.planned[part] for one in planned.values())
    ]
    most = max(max(sum(one.planned.values()), _measured(one) or 0) for one in planned.values())
    scale = (WIDTH - _LEFT - _RIGHT) / most
    drawn, words = [], []
    for row, (name, tuning) in enumerate(planned.items()):
        y, x = 8 + row * _PITCH, float(_LEFT)
        drawn.append(f'<text x="{_LEFT - 10}" y="{y + 13}" text-anchor="end">{shortened(name)}</text>')
        for place, part in enumerate(names):
            width = tuning.planned[part] * scale
            drawn.append(f'<rect class="{colour(place)} bar" x="{x:.1f}" y="{y}" width="{width:.1f}" height="18"/>')
            x += width
        whole, measured = sum(tuning.planned.values()), _measured(tuning)
        words.append(f"{name} " + ", ".join(f"{part} {size(tuning.planned[part])}" for part in names))
        end = x
        if measured:
            at = _LEFT + measured * scale
            end = max(x, at)
            drawn.append(f'<path class="whisker" d="M{at:.1f} {y - 3}v24"/>')
            words[-1] += f"; measured {size(measured)}"
        drawn.append(f'<text x="{end + 6:.1f}" y="{y + 13}">{size(whole)}</text>')
    picture = framed(
        8 + len(planned) * _PITCH,
        "Memory planned by part; the line is the measured peak",
        "; ".join(words),
        "".join(drawn),
    )
    return picture + legend(list(enumerate(names)))


def _measured(tuning: TuningReport) -> int | None:
    if tuning.peak_memory_bytes is None or tuning.memory_after_import_bytes is None:
        return None
    return tuning.peak_memory_bytes - tuning.memory_after_import_bytes
