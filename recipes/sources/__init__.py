"""What several sources of drafts gain: live and by replay, in one file."""
