"""Pictures of migrations, one a module; each function returns a matplotlib `Figure` that is yours."""
