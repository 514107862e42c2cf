"""Many tokens at once through the layers of a decode plan, from its states to its states."""
