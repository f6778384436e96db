"""Messages of the Open Inference Protocol, parsed and written; errors with their HTTP status."""
