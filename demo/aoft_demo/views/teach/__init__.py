"""The view Teach: a new task from a few pictures."""
