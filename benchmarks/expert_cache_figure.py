"""Draws what a record of expert_cache_replay says of switches of domain, as SVG.

python -m benchmarks.expert_cache_figure RECORD.json > docs/decisions/expert-cache-switches.svg
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

from jinja2 import Template

_LINE = re.compile(r"(\w+), (\w+ then \w+), tokens (\d+) to (\d+), points below the text alone")
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 300.0, 200.0, 46.0, 34.0, 60.0
_MOST_TOKENS, _MOST_POINTS, _LEAST_POINTS = 1000.0, 50.0, -5.0

_SVG = Template("""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width }} 292" font-family="sans-serif" font-size="11">
<rect width="100%" height="100%" fill="white"/>
{%- for panel in panels %}
<g transform="translate({{ panel.x }} {{ top }})">
<text x="0" y="-14" font-weight="bold">{{ panel.name }}: points of hit rate below the same text alone</text>
{%- for value, y in rows %}
<line x1="0" x2="{{ inner }}" y1="{{ y }}" y2="{{ y }}" stroke="{{ '#888' if value == 0 else '#ddd' }}"/>
<text x="-6" y="{{ y + 4 }}" text-anchor="end">{{ value }}</text>
{%- endfor %}
{%- for value, x in columns %}
<text x="{{ x }}" y="{{ bottom + 16 }}" text-anchor="middle">{{ value }}</text>
{%- endfor %}
<rect x="{{ recovered }}" y="0" width="{{ inner - recovered }}" height="{{ bottom }}" fill="#2a7" fill-opacity="0.08"/>
{%- for name, points in panel.lines %}
<polyline points="{{ points }}" fill="none" stroke="{{ colours[loop.index0 % 6] }}" stroke-width="1.6">\
<title>{{ name }}</title></polyline>
{%- endfor %}
<text x="{{ inner / 2 }}" y="{{ bottom + 32 }}" text-anchor="middle">tokens behind the switch of domain</text>
</g>
{%- endfor %}
</svg>
""")


def draw(record: Path) -> str:
    """The figure: a panel a policy, a line a switch, each window's value at its middle."""
    derived = json.loads(record.read_text(encoding="utf-8"))["derived"]
    lines: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for name, points in derived.items():
        if found := _LINE.fullmatch(name):
            policy, switch, first, last = found.groups()
            lines[policy][switch].append(((int(first) + int(last)) / 2, points))

    def x(tokens: float) -> float:
        return round(_WIDTH * tokens / _MOST_TOKENS, 1)

    def y(points: float) -> float:
        return round(_HEIGHT * (_MOST_POINTS - points) / (_MOST_POINTS - _LEAST_POINTS), 1)

    panels = [
        {
            "name": policy.upper(),
            "x": _LEFT + i * (_WIDTH + _GAP),
            "lines": [(s, " ".join(f"{x(at)},{y(below)}" for at, below in sorted(ps))) for s, ps in switches.items()],
        }
        for i, (policy, switches) in enumerate(sorted(lines.items(), reverse=True))
    ]
    return _SVG.render(
        panels=panels,
        top=_TOP,
        inner=_WIDTH,
        bottom=_HEIGHT,
        width=_LEFT + len(panels) * (_WIDTH + _GAP),
        recovered=x(500),
        rows=[(value, y(value)) for value in (0, 10, 20, 30, 40, 50)],
        columns=[(value, x(value)) for value in (0, 250, 500, 750, 1000)],
        colours=("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#a6761d"),
    )


if __name__ == "__main__":
    sys.stdout.write(draw(Path(sys.argv[1])))
