"""The parts put together: network, first stage, engine."""
