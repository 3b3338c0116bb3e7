//! Agents and dashboards.
