//! The binary; everything is in [`messaging_hub::cli`].

fn main() -> std::process::ExitCode {
    messaging_hub::cli::run()
}
