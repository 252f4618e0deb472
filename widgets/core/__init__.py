"""Code that all widgets share: scripts and styles, visible errors, packed arrays, offline pages, status lines, panels."""
