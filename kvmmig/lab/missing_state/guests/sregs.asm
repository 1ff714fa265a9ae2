; sregs: segments, descriptor tables, control registers, EFER and the APIC's mode, none of them at its default
;@ entry real16
%include "real16.inc"
EFER equ 0xc0000080
start:
    call apic_on
    mov ax, 0x2222
    mov es, ax
    mov ax, 0x1234
    mov fs, ax
    mov ax, 0x4321
    mov gs, ax
    lgdt [gdt]
    lidt [idt]
    mov eax, cr0
    or eax, 2                   ; MP
    mov cr0, eax
    mov eax, 0x5678
    mov cr2, eax
    mov eax, 0x7000
    mov cr3, eax
    mov eax, cr4
    or eax, 0x200               ; OSFXSR
    mov cr4, eax
    mov ecx, EFER
    rdmsr
    or eax, 1                   ; SCE
    wrmsr
    call be_moved
    mov ax, es
    cmp ax, 0x2222
    jne failed
    mov ax, fs
    cmp ax, 0x1234
    jne failed
    mov ax, gs
    cmp ax, 0x4321
    jne failed
    sgdt [0x8f10]
    cmp word [0x8f10], 0x77
    jne failed
    sidt [0x8f10]
    cmp word [0x8f10], 0x3fb
    jne failed
    mov eax, cr0
    test eax, 2
    jz failed
    mov eax, cr2
    cmp eax, 0x5678
    jne failed
    mov eax, cr3
    cmp eax, 0x7000
    jne failed
    mov eax, cr4
    test eax, 0x200
    jz failed
    mov ecx, EFER
    rdmsr
    test eax, 1
    jz failed
    mov ecx, 0x1b
    rdmsr
    and eax, 0xc00
    cmp eax, 0xc00
    jne failed
    jmp passed
gdt:
    dw 0x77
    dd 0x6000
idt:
    dw 0x3fb
    dd 0
