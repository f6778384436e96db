"""The work behind each tab, independent of the page."""
