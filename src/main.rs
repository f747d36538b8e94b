//! The binary; everything is in [`messaging_hub::cli`].

/// What a publish allocates on one thread is freed on another when its confirm
/// comes. In an outage under load that cost glibc's allocator a quarter of the hub's
/// time.
#[cfg(not(target_env = "msvc"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> std::process::ExitCode {
    messaging_hub::cli::run()
}
