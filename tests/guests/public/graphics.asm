; Fills the screen with colours in mode 13h.
    org 0x7c00
    mov ax, 0x13
    int 0x10
    push 0xa000
    pop es
    xor di, di
    mov cx, 64000
fill:
    mov ax, di
    stosb
    loop fill
    jmp $
    times 510-($-$$) db 0
    dw 0xaa55
