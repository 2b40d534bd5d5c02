"""Arms of a sweep: their phases, the values that they try, and the settings that runs share."""
