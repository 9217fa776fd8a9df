"""Pictures of a training: previews, the window, time-lapse videos."""
