//! Questions to the kernel that no file answers.

/// Version of Landlock's interface, or `None` where the kernel has none or it is switched off.
pub fn landlock_abi() -> Option<u32> {
    const VERSION: libc::c_uint = 1; // LANDLOCK_CREATE_RULESET_VERSION
    // SAFETY: with a null pointer, a size of zero and this flag the call reads no memory and creates nothing, it only
    // returns a number; a kernel without the call returns -1.
    let abi = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0usize, VERSION)
    };
    u32::try_from(abi).ok().filter(|abi| *abi > 0)
}
