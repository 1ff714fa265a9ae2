; Boots into 64-bit mode by itself, at privilege level 0.
    bits 16
    org 0x7c00
    cli
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov edi, 0x1000
    mov cr3, edi
    xor eax, eax
    mov ecx, 3 * 1024
    rep stosd
    mov dword [0x1000], 0x2003
    mov dword [0x2000], 0x3003
    mov dword [0x3000], 0x83
    mov eax, cr4
    or eax, 1 << 5
    mov cr4, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 1 << 8
    wrmsr
    mov eax, cr0
    or eax, 1 << 31 | 1
    mov cr0, eax
    lgdt [gdt.pointer]
    jmp 8:in_long_mode
    bits 64
in_long_mode:
    mov ax, 16
    mov ds, ax
    mov rax, 0x1f6b1f6f1f211f6b
    mov rbx, "64 bits!"
    mov dx, 0x3f8
.next:
    mov al, bl
    out dx, al
    shr rbx, 8
    jnz .next
    hlt
    jmp in_long_mode
align 8
gdt:
    dq 0, 0x00209a0000000000, 0x0000920000000000
.pointer:
    dw $ - gdt - 1
    dd gdt
    times 510-($-$$) db 0
    dw 0xaa55
