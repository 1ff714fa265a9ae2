; int 1Ah, the clock: ticks since the guest was started, 18.2 a second. There is no clock that tells the date.

int1a:
    SERVICE
    cmp ah, 0x00
    je .ticks
    cmp ah, 0x01
    je .set
    cmp ah, 0x08                            ; the real-time clock
    jb bad
    cmp ah, 0xb1                            ; PCI
    je .no_pci
    UNSERVED 0x1a
.ticks:
    mov eax, [TICKS]
    mov [bp + C_DX], ax
    shr eax, 16
    mov [bp + C_CX], ax
    mov al, [MIDNIGHTS]
    mov byte [MIDNIGHTS], 0
    mov [bp + C_AX], al
    jmp good
.set:
    mov ax, cx
    shl eax, 16
    mov ax, dx
    mov [TICKS], eax
    jmp good
.no_pci:
    mov byte [bp + C_AX + 1], 0x81
    jmp bad
