"""The shared fleet, the tasks of each session in it, and the queue of trainings."""
