/* NAME: says hello, and ends. "make" builds it, "kvmmig run ./NAME.elf" runs it.
 *
 * There is no C library: what is printed goes to the serial port, and the guest ends by a write to port 0xf4. GCC may
 * ask for memcpy, memmove, memset and memcmp; write those that it misses.
 */

enum { SERIAL = 0x3f8, EXIT = 0xf4 };

static void out(unsigned short port, unsigned char value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static void print(const char *text)
{
    while (*text)
        out(SERIAL, *text++);
}

/* Every vCPU comes here, each on a stack of its own. What it returns is the guest's exit status. */
int guest_main(unsigned long vcpu, unsigned long vcpus, unsigned long memory, unsigned long tsc_khz)
{
    (void)vcpus, (void)memory, (void)tsc_khz;
    if (vcpu != 0)
        for (;;)
            __asm__ volatile("pause");
    print("Hello from NAME.\n");
    return 0;
}

/* The first instruction. The arguments are in the registers where C expects them. */
__asm__(".globl _start\n"
        "_start:\n"
        "    call guest_main\n"
        "    outb %al, $0xf4\n"
        "1:  pause\n"
        "    jmp 1b\n");
