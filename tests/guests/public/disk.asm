; Loads two sectors from the boot disk, and prints a word of each in hexadecimal.
[org 0x7c00]
    mov [BOOT_DRIVE], dl
    mov bp, 0x8000
    mov sp, bp

    mov bx, 0x9000
    mov dh, 2
    mov dl, [BOOT_DRIVE]
    call disk_load

    mov dx, [0x9000]
    call print_hex
    mov dx, [0x9000 + 512]
    call print_hex
    jmp $

disk_load:
    push dx
    mov ah, 0x02
    mov al, dh
    mov ch, 0x00
    mov dh, 0x00
    mov cl, 0x02
    int 0x13
    jc disk_error
    pop dx
    cmp dh, al
    jne disk_error
    ret
disk_error:
    mov bx, DISK_ERROR_MSG
    call print_string
    jmp $

print_string:
    pusha
    mov ah, 0x0e
.next:
    mov al, [bx]
    cmp al, 0
    je .done
    int 0x10
    inc bx
    jmp .next
.done:
    popa
    ret

print_hex:
    pusha
    mov cx, 4
.digit:
    dec cx
    mov ax, dx
    shr dx, 4
    and ax, 0xf
    mov bx, HEX_OUT + 2
    add bx, cx
    cmp ax, 0xa
    jl .set
    add al, 0x27
.set:
    add al, 0x30
    mov byte [bx], al
    cmp cx, 0
    jne .digit
    mov bx, HEX_OUT
    call print_string
    popa
    ret

BOOT_DRIVE: db 0
DISK_ERROR_MSG db "Disk read error!", 0
HEX_OUT: db "0x0000 ", 0

    times 510-($-$$) db 0
    dw 0xaa55

    times 256 dw 0xdada
    times 256 dw 0xface
