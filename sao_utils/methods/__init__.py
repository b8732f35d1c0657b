"""Methods put stages together, as their papers do: `sao` is SAO's Algorithm 1."""
