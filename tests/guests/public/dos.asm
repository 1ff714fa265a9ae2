; Written for DOS, though it says 0x7c00.
    org 0x7c00
    mov dx, msg
    mov ah, 9
    int 0x21
    mov ax, 0x4c00
    int 0x21
msg: db "Hello, world!$"
    times 510-($-$$) db 0
    dw 0xaa55
