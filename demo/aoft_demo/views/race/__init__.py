"""The view Race: one mixed batch against one session per task."""
