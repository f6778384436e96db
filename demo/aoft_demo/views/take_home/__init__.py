"""The view Take home: a task as a verified artefact."""
