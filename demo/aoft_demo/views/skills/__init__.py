"""The view Skills: the tasks of the fleet, added, removed and compared."""
