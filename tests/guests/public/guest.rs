// A guest without the standard library.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::fmt::{self, Write};
use core::panic::PanicInfo;

struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            unsafe { asm!("out dx, al", in("dx") 0x3f8u16, in("al") byte) };
        }
        Ok(())
    }
}

fn exit(status: u8) -> ! {
    unsafe { asm!("out 0xf4, al", in("al") status) };
    loop {}
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    let _ = writeln!(Serial, "{info}");
    exit(1)
}

// The compiled core library refers to it, though nothing unwinds here.
#[no_mangle]
extern "C" fn rust_eh_personality() {}

global_asm!(".globl _start", "_start: call {main}", "ud2", main = sym main);

extern "C" fn main(vcpu: u64, _vcpus: u64, memory: u64, _tsc_khz: u64) -> ! {
    if vcpu != 0 {
        loop {}
    }
    let _ = writeln!(Serial, "Hello from Rust, in {} MiB.", memory >> 20);
    exit(7)
}
