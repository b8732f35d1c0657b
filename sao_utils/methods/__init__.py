"""Methods combine stages as their papers do: `sao`, for example, is SAO's Algorithm 1."""
