"""The colours of methods: for figures on any page, and for the widgets on light and on dark pages."""

from __future__ import annotations

FIGURES = ("#636366", "#3696fa", "#ae4218", "#479170", "#dd60b8", "#a2970e")
"""Colours of static figures, whose page may be light or dark: grey, blue, orange, green, pink, ochre."""
LIGHT = ("#393b3b", "#08449c", "#ab5a02", "#187d69", "#87116b", "#5d4d16")
"""The same hues for widgets on light pages, dark enough for text."""
DARK = ("#b3b2b2", "#2589f2", "#f68e27", "#a6f7d2", "#d4608c", "#ece33a")
"""The same hues for widgets on dark pages."""

DARK_THEMES = (
    'data-jp-theme-light="false"',
    'data-vscode-theme-kind="vscode-dark"',
    'data-vscode-theme-kind="vscode-high-contrast"',
)
"""Attributes of the body by which JupyterLab and VS Code say that their theme is dark."""
LIGHT_THEMES = "[data-jp-theme-light], [data-vscode-theme-kind]"
"""Bodies whose theme is known; on others the browser's preference decides."""


def variables(colours: tuple[str, ...]) -> str:
    """Returns the colours as CSS variables `--series-0`, `--series-1` and so on."""
    return " ".join(f"--series-{index}: {colour};" for index, colour in enumerate(colours))


def style() -> str:
    """Returns the style sheet that defines the variables for light and dark pages."""
    dark = variables(DARK)
    return (
        f".refine-lab {{ {variables(LIGHT)} }}\n"
        f"{', '.join(f'body[{theme}] .refine-lab' for theme in DARK_THEMES)} {{ {dark} }}\n"
        f"@media (prefers-color-scheme: dark) {{ body:not({LIGHT_THEMES}) .refine-lab {{ {dark} }} }}\n"
    )
