//! What systemd is told. Without systemd nothing happens.

use systemd::daemon::{STATE_READY, STATE_STATUS, STATE_STOPPING, notify};

/// One line for `systemctl status`.
pub fn status(text: &str) {
    tell(&[(STATE_STATUS, text)]);
}

/// Everything is recovered and requests are answered.
pub fn ready() {
    tell(&[(STATE_READY, "1"), (STATE_STATUS, "serving")]);
}

/// The end has begun.
pub fn stopping() {
    tell(&[(STATE_STOPPING, "1"), (STATE_STATUS, "undoing what runs")]);
}

fn tell(state: &[(&str, &str)]) {
    if let Err(cause) = notify(state.iter()) {
        tracing::warn!("systemd cannot be told {state:?}: {cause}");
    }
}
