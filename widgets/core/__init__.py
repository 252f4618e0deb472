"""What every widget shares: scripts and styles, visible errors, packed arrays, offline pages, status lines, panels."""
