"""A plan in a notebook: the widths of its layers as bars, front to back, in the notebook's own colours."""

from __future__ import annotations

from collections.abc import Sequence

TEMPLATE = """
<figure style="margin:0;max-width:60em;overflow-x:auto">
<figcaption style="padding-bottom:.5em">{{ title }}</figcaption>
<div role="img" aria-label="{{ title }}" style="display:flex;align-items:flex-end;gap:1px;height:8em">
{% for name, kept, width in layers %}
<div title="{{ name }}: {{ kept }} of {{ width }} channels" style="flex:1 0 3px;max-width:2.5em;min-height:3px;
height:{{ (100 * width / most) | round(1) }}%;display:flex;align-items:flex-end;
background:color-mix(in srgb, currentColor 15%, transparent)">
<div style="flex:1;min-height:1px;height:{{ (100 * kept / width) | round(1) }}%;
background:{{ "#3b82f6" if kept < width else "color-mix(in srgb, currentColor 45%, transparent)" }}"></div></div>
{% endfor %}
</div>
<div style="font-size:85%;padding-top:.25em">Layers, front to back: channels of the original,
and those kept (<span style="color:#3b82f6">blue</span> where some are removed). Point at a bar for its layer.</div>
</figure>
"""


def bars(title: str, layers: Sequence[tuple[str, int, int]]) -> str:
    """The markup of the bars: each layer's name, kept channels and width.

    >>> "conv: 3 of 4 channels" in bars("a plan", [("conv", 3, 4)])
    True
    """
    from jinja2 import Environment  # for notebooks only

    most = max((width for _, _, width in layers), default=1)
    return Environment(autoescape=True).from_string(TEMPLATE).render(title=title, layers=layers, most=most)
