"""One run on several processes, a GPU each: who takes part, how they talk, who decides."""
